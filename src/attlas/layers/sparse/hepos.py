"""Hepos: the heads of cross-attention deal the source's tokens out among them, a stride apart.

    head h sees the source tokens h mod s, h mod s + s, h mod s + 2s, …
    weights_h = softmax over these of (q_h k_hᵀ / √d)

Every token is read by heads / s heads, and all of them together read the whole source.

Cost: 1 / s of the pairs, of their memory and of the keys and values that are read.
Reduces to softmax attention at s = 1.
Source: "Efficient Attentions for Long Document Summarization". Its program appends up to s zero tokens to
the source and lets heads see them; here they see none. An encoder beside it is any other layer: with
`window`, `strided`, or clusters as in the routing transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attlas import masks, ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.masks.algebra import Reach
from attlas.options import option
from attlas.supports import Supports
from attlas.tracing import traced


@dataclass(frozen=True)
class Dealt(Mask):
    """Keys dealt out to the heads in turn: head h sees every `stride`-th key, from h mod `stride` on."""

    tensors: ClassVar[tuple[Tensor, ...]] = ()
    leaves: ClassVar[tuple[Mask, ...]] = ()

    stride: int
    heads: int

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Boolean tensor over the broadcast of the index tensors."""
        return ((k - h) % self.stride == 0) & (q == q)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        """(some, every): a block has a head's key if it is long enough to reach its first."""
        head, any_query = torch.arange(self.heads, device=k_lo.device)[:, None, None], q_lo == q_lo
        some = k_lo + (head - k_lo) % self.stride <= k_hi
        return some & any_query, some & any_query & ((k_lo == k_hi) | (self.stride == 1))


@mechanism("hepos-cross-attention", aliases=("hepos",), example={"stride": 2},
           reduces_to=Reduction("softmax", {"stride": 1}))  # fmt: skip
class HeposCrossAttention(Attention):
    """Cross-attention of which each head reads every s-th token."""

    supports = Supports(causal=False, counts=True)
    changes = ("mask",)

    stride: int = option("s, a divisor of heads", default=4, at_least=1)

    def setup(self) -> None:
        """The pattern."""
        super().setup()
        if self.heads % self.stride:
            raise ValueError(f"heads must be a multiple of stride={self.stride}, got {self.heads}")
        self.pattern = masks.both(self.pattern, Dealt(self.stride, self.heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Each head over its own keys, where nothing but padding behind the source hides others."""
        if self.score_mod is not None or self.own_mask is not None or not _ends(inputs):
            return super().attend(q, k, v, inputs)
        s, valid, parts = self.stride, inputs.valid, []
        for first in range(s):
            own = torch.arange(first, self.heads, s, device=q.device) * self.kv_heads // self.heads
            keys, values = (x[:, own, first::s] for x in (k, v))
            parts.append(ops.attend(
                q[:, first::s], keys, values, scale=self.scale,
                mask=None if valid is None else valid[:, None, None, first::s],
                dropout=self.dropout if self.training else 0.0,
            ))  # fmt: skip
        return torch.stack(parts, dim=2).flatten(1, 2)


def _ends(inputs: Inputs) -> bool:
    """Whether no mask was given but one that hides padding behind each row's last token."""
    if inputs.valid is None or traced():
        return inputs.mask is None
    return not bool((inputs.valid[:, 1:] & ~inputs.valid[:, :-1]).any())
