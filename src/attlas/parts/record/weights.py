"""The weights themselves, for those who ask.

    A = softmax(q kᵀ · scaling + mask)        [layers, batch, heads, tokens, columns]

Cost: quadratic in the length; the other recorders are linear.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attlas.attach.call import Call
from attlas.catalog.registry import mechanism
from attlas.parts.record.rows import RowRecorder


@mechanism("weights", paper="")
class Weights(RowRecorder):
    """Records all weights, [layers, batch, heads, tokens, columns], in original positions."""

    def measure(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Float[Tensor, "batch heads query columns"]:
        """The block, with zeros for tokens that a cache dropped."""
        if keys.ndim == 1:
            return weights
        columns = call.forward_pass.offset + call.q.shape[2]
        at = keys.clamp(min=0).long()[:, :, None].expand_as(weights)
        return weights.new_zeros(*weights.shape[:3], columns).scatter_add_(-1, at, weights)

    def take_back(self, seen: int) -> None:
        """Forget rows and columns of tokens behind the first `seen`."""
        super().take_back(seen)
        for blocks in self._rows.values():
            blocks[:] = [block[..., :seen] for block in blocks]

    def result(self) -> Any:
        """All weights; queries that saw fewer columns have zeros behind."""
        widest = max(block.shape[-1] for blocks in self._rows.values() for block in blocks)
        return torch.stack([
            torch.cat([F.pad(b, (0, widest - b.shape[-1])) for b in self._rows[layer]], dim=2)
            for layer in sorted(self._rows)
        ])  # fmt: skip
