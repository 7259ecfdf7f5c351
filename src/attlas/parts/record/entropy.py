"""Attention entropy: how widely each query spreads its attention.

    H(i) = − Σ_j A_ij ln A_ij        in nats; 0 for one key, ln n for n equal ones

Cost: one pass over the weights, held a block at a time.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attlas.attach.call import Call
from attlas.catalog.registry import mechanism
from attlas.parts.record.rows import RowRecorder


@mechanism("entropy", paper="")
class Entropy(RowRecorder):
    """Records the entropy of each query's weights, [layers, batch, heads, tokens]."""

    def measure(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Float[Tensor, "batch heads query"]:
        """− Σ A ln A over the keys."""
        spread: Tensor = torch.special.entr(weights)
        return spread.sum(dim=-1)
