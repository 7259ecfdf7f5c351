"""Sink mass: how much attention rests on the first tokens.

    S(i) = Σ_{j < s} A_ij

Padding does not count: the first tokens are each row's first valid ones. Cost: one pass over the
weights, held a block at a time.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attlas.attach.call import Call
from attlas.catalog.registry import mechanism
from attlas.options import option
from attlas.parts.record.rows import RowRecorder


@mechanism("sink-mass", paper="")
class SinkMass(RowRecorder):
    """Records each query's weight on the first tokens, [layers, batch, heads, tokens]."""

    sinks: int = option("how many first tokens count", default=1, at_least=1, kw_only=False)

    def measure(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Float[Tensor, "batch heads query"]:
        """Σ A over the first valid tokens."""
        there, rank = call.rows.at(keys.expand(weights.shape[0], -1) if keys.ndim == 1 else keys)
        first = there & (rank < self.sinks)
        first = first[:, None] if first.ndim == 2 else first
        return (weights * first[:, :, None]).sum(dim=-1)
