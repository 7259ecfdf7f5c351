"""Long-short attention: most heads see a short window, the others everything.

    short heads: softmax over the keys less than `window` tokens away;   long heads: over all keys
    y = W_O concat(long heads, short heads), each with a softmax of its own

Short heads hold the dense ties between neighbours, which plain heads can only express by ever larger
logits; `largest_logits` tells how large those of any layer have grown.

Cost: long heads plain attention, short heads n·window; two fused calls, memory linear.
Reduces to softmax attention where the window spans the sequence.
Source: "Short-Range Dependency Effects on Transformer Instability and a Decomposed Attention
Solution", in retellings and a third party's program: two kinds of heads, long ones seeing all, without
further parameters. Not established: the share of long heads (here a quarter), the window (here 128).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attlas import masks, ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.masks.algebra import And
from attlas.positions import ScoreMod, additive


class _Reach(And):
    """`base`, and a window on the heads from `long` on."""

    def __init__(self, base: Mask | None, window: Mask, long: int, heads: int) -> None:
        each = masks.per_head(*[masks.full] * long, *[window] * (heads - long))
        super().__init__(masks.full if base is None else base, each)
        self.base = base
        self.near = window if base is None else base & window


@lru_cache(maxsize=128)
def _from_head(score_mod: ScoreMod | None, first: int) -> ScoreMod | None:
    """The score_mod for heads from `first` on; kept, since each new function object compiles anew."""
    if score_mod is None:
        return None

    def later(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h + first, q_idx, kv_idx)

    return additive(later) if getattr(score_mod, "additive", False) else later


@mechanism("long-short-attention", aliases=("ls-attention",), reduces_to=Reduction(
    "softmax", {"window": 1 << 20}, lambda layer, plain: plain.load_state_dict(layer.state_dict())
))  # fmt: skip
class LongShort(Attention):
    """Attention with long heads first and short ones after them.

    Args:
        long_heads: heads without a window; a quarter, at least one, unless given.
        window: keys before a query that its short heads see, its own among them; as many after it
            where the layer is not causal.
    """

    has_cross_form = False

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, long_heads: int | None = None,
        window: int = 128, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, *args, **options)
        self.window = at_least_one("window", window)
        self.long_heads = max(1, heads // 4) if long_heads is None else long_heads
        if not 0 <= self.long_heads <= heads:
            raise ValueError(f"long_heads must lie in 0..heads={heads}, got {long_heads}")

    def mask(self, q: Tensor, k: Tensor, inputs: Inputs) -> Mask | Tensor | None:
        """Which pairs may meet, for each head."""
        pairs, near = super().mask(q, k, inputs), masks.window(self.window)
        if not isinstance(pairs, Tensor):
            return _Reach(pairs, near, self.long_heads, self.heads)
        reach = _Reach(None, near, self.long_heads, self.heads)
        return pairs & masks.dense(reach, q.shape[2], k.shape[2], device=q.device)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Tensor:
        """Long and short heads in a fused call each, so that short ones skip what they do not see."""
        long, group = self.long_heads, self.heads // self.kv_heads
        if isinstance(mask, Tensor):
            parts: tuple[Any, Any] = mask[:, :long], mask[:, long:]
        elif isinstance(mask, _Reach) and mask.left.heads is None:
            parts = mask.base, mask.near
        else:  # a pattern that tells heads apart by itself
            parts, long = (mask, None), self.heads
        if long % group:  # a key head of both kinds
            k, v, group = ops.repeated(k, q.shape[1]), ops.repeated(v, q.shape[1]), 1
        kinds = (slice(0, long), slice(long, self.heads))
        outs = [
            ops.attend(
                q[:, kind], k[:, kind.start // group : kind.stop // group],
                v[:, kind.start // group : kind.stop // group], mask=part, scale=self.scale,
                score_mod=_from_head(self.score_mod, kind.start),
                dropout=self.dropout if self.training else 0.0,
            )
            for kind, part in zip(kinds, parts, strict=True) if kind.start < kind.stop
        ]  # fmt: skip
        return torch.cat(outs, dim=1)


@torch.no_grad()
def largest_logits(layer: Attention, x: Tensor, **given: Any) -> Tensor:
    """Largest visible logit before the softmax, one a head [heads], 256 queries at a time."""
    q, k, _, mask, _ = layer.prepare(x, **given)
    offset, found = k.shape[2] - q.shape[2], []
    for start in range(0, q.shape[2], 256):
        rows = q[:, :, start : start + 256]
        scores = layer.score(rows, k)
        if layer.score_mod is not None:
            scores = layer.score_mod(scores, *ops.indices(scores, offset + start))
        if isinstance(mask, Mask):
            seen = ops.as_dense(mask, rows.shape[2], k.shape[2], offset + start, q.device)
        else:
            seen = (
                mask[:, :, start : start + 256] if mask is not None and mask.shape[2] > 1 else mask
            )
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        found.append(scores.amax((0, 2, 3)))
    return torch.stack(found).amax(0)
