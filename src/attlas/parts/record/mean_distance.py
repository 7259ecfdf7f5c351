"""Mean distance: how far from itself each query looks.

    D(i) = Σ_j A_ij |i − j|          in tokens, of the original sequence

Cost: one pass over the weights, held a block at a time.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attlas.attach.call import Call
from attlas.catalog.registry import mechanism
from attlas.parts.record.rows import RowRecorder


@mechanism("mean-distance", paper="")
class MeanDistance(RowRecorder):
    """Records the mean distance of each query's attention, [layers, batch, heads, tokens]."""

    def measure(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Float[Tensor, "batch heads query"]:
        """Σ A |i − j|; empty slots have no weight."""
        far = (queries[:, None] - keys[..., None, :]).abs()
        return (weights * far).sum(dim=-1)
