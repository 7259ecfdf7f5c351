"""Column sums: how much attention each token receives.

    C(j) = Σ_i A_ij                                      over the queries so far
    sink metric(j) = share of heads with C(j)/(T − j) > ε    (T − j queries can see token j)

Cost: one pass over the weights, held a block at a time; one number a key.

Source of the metric: "When Attention Sink Emerges in Language Models: An Empirical View".
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attlas.attach.call import Call
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.parts.record.sums import SumRecorder


@mechanism("column-sums", paper="")
class ColumnSums(SumRecorder):
    """Records the attention that each token receives, [layers, batch, heads, tokens]."""

    def update(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Add a block's columns up."""
        batch, heads, count = weights.shape[:3]
        columns = max(call.forward_pass.offset + call.q.shape[2], call.k.shape[2])
        if call.original_positions is not None:
            columns = call.forward_pass.offset + call.q.shape[2]
        at = keys.clamp(min=0).long().expand(batch, heads, -1)

        def onto_columns(rows: Tensor) -> Tensor:
            return weights.new_zeros(batch, heads, columns).scatter_add_(-1, at, rows)

        def each() -> list[Tensor]:  # as wide as the text was at each token
            ends = (queries + 1).tolist() if call.is_causal else [columns] * count
            return [onto_columns(weights[:, :, i])[..., :end] for i, end in enumerate(ends)]

        self.add(call.layer, onto_columns(weights.sum(dim=2)), each)

    def result(self) -> Float[Tensor, "layers batch heads tokens"]:
        """Attention received, summed over the queries."""
        return torch.stack([self._sums[layer] for layer in sorted(self._sums)])

    def importance(self) -> Float[Tensor, "layers batch heads tokens"]:
        """Mean attention that each token receives from the queries that can see it (causal)."""
        sums = self.result()
        tokens = sums.shape[-1]
        return sums / (tokens - torch.arange(tokens, device=sums.device))

    def sink_metric(self, epsilon: float = 0.3) -> Float[Tensor, " tokens"]:
        """Percentage of (layer, row, head) in which each token's importance exceeds `epsilon`.

        Raises:
            ValueError: epsilon outside (0, 1).
        """
        if not 0 < epsilon < 1:
            raise UserError(f"epsilon must lie in (0, 1), got {epsilon}")
        return 100 * (self.importance() > epsilon).float().mean(dim=(0, 1, 2))
