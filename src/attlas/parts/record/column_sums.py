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

from attlas.attach.call import Call, ForwardPass
from attlas.attach.part import Recorder
from attlas.catalog.registry import mechanism
from attlas.errors import UserError


@mechanism("column-sums", paper="")
class ColumnSums(Recorder):
    """Records the attention that each token receives, [layers, batch, heads, tokens].

    The record is of one sequence and grows while a cache carries it on.
    """

    def setup(self) -> None:
        """Nothing is recorded yet."""
        super().setup()
        self._sums: dict[int, Tensor] = {}

    def begin(self, forward_pass: ForwardPass) -> None:
        """A call without a past begins a new sequence."""
        if forward_pass.offset == 0:
            self._sums.clear()

    def update(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Add a block's columns up."""
        batch, heads = weights.shape[:2]
        columns = max(call.forward_pass.offset + call.q.shape[2], call.k.shape[2])
        if call.original_positions is not None:
            columns = call.forward_pass.offset + call.q.shape[2]
        sums = self._sums.get(call.layer)
        if sums is None or sums.shape[-1] < columns:
            grown = weights.new_zeros(batch, heads, columns)
            if sums is not None:
                grown[..., : sums.shape[-1]] = sums
            sums = self._sums[call.layer] = grown
        at = keys.clamp(min=0).long().expand(batch, heads, -1)
        sums.scatter_add_(-1, at, weights.sum(dim=2))

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
