"""SnapKV: the prompt's last queries tell which of its tokens will be read.

    A      = softmax(q k^T / √d)      of the last w queries over all keys, causal among themselves
    s(j)   = pool_κ( mean over the w queries of A[·, j] )    for the first T − w keys
    score  = mean of s over the query heads of a key head;   the last w tokens always stay

Pooling along positions keeps neighbours of what is read. Cost: w more rows of attention per layer.
Keeps everything, hence reduces to full attention, at keep = 1.

Source: "SnapKV: LLM Knows What You are Looking for Before Generation". The defaults are those of its long
texts: 32 queries, max pooling of 7. Other libraries begin with 64 queries and average pooling of 5, which
on SmolLM2 finds a quarter to a half of the needles that these find (see docs/which-cache.md). The mean
over queries and over the heads of a group follows common implementations.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attlas.attach.call import Call
from attlas.cache.asked import asked_weights, remember
from attlas.cache.policy import CachePolicy, Slots
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.layer import LayerState


@mechanism("snapkv", example={"keep": 0.5, "window": 4})
class SnapKV(CachePolicy):
    """Keep what the prompt's last queries read, and the tokens of these queries."""

    comparable: ClassVar[tuple[str, ...]] = (
        "(keep=0.5)", "(keep=0.25)", "(keep=0.125)",
        "(keep=0.25, window=64, kernel=5, pooling='avg')",
        "(keep=0.125, window=64, kernel=5, pooling='avg')",
        "(keep=0.5)+quantized-cache(bits=4)", "(keep=0.25)+quantized-cache(bits=4)",
    )  # fmt: skip

    window: int = option("how many of the last queries are asked", default=32, at_least=1)
    kernel: int = option("width of the pooling along positions, odd", default=7, at_least=1)
    pooling: Literal["avg", "max"] = option("how neighbours are pooled", default="max")

    def setup(self) -> None:
        """Refuse a kernel without a middle."""
        super().setup()
        if self.kernel % 2 == 0:
            raise UserError(f"kernel must be odd, got {self.kernel}")

    @property
    def floor(self) -> tuple[str, int]:
        """The window."""
        return "window", self.window

    def learn(self, state: LayerState, call: Call) -> None:
        """The last w valid queries so far, with their columns (-1 where a row has fewer)."""
        remember(state, call, lambda rank, count, _: rank >= count - self.window)

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """Pooled mean attention of the last queries; their own tokens above all others."""
        asked = state.tensors["columns"] >= 0
        weights = asked_weights(state, slots)
        if asked.all():
            mean = weights.mean(dim=3)
        else:
            share = asked / asked.sum(dim=-1, keepdim=True)
            mean = torch.einsum("bhgwt,bw->bhgt", weights, share)
        window = (slots.rank >= (slots.total - asked.sum(dim=-1))[:, None, None]) & slots.valid
        mean = mean.masked_fill(window[:, :, None] | ~slots.valid[:, :, None], 0.0)
        pooled: Tensor = self._pool(mean.flatten(0, 1)).unflatten(0, mean.shape[:2]).mean(dim=2)
        return pooled.masked_fill(window, pooled.max().item() + 1)

    def _pool(self, x: Float[Tensor, "rows groups slots"]) -> Float[Tensor, "rows groups slots"]:
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        pooled: Tensor = pool(x, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled
