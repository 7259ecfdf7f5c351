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

from typing import Any

import torch
from torch import Tensor

from attlas import masks, ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.masks.algebra import And
from attlas.options import option
from attlas.positions import on_heads
from attlas.supports import Supports


class _Reach(And):
    """`base`, and a window on the heads from `long` on."""

    def __init__(self, base: Mask | None, window: Mask, long: int, heads: int) -> None:
        each = masks.per_head(*[masks.full] * long, *[window] * (heads - long))
        super().__init__(masks.full if base is None else base, each)
        self.base = base
        self.near = window if base is None else base & window


@mechanism("long-short-attention", aliases=("ls-attention",), reduces_to=Reduction(
    "softmax", {"window": 1 << 20}, lambda layer, plain: plain.load_state_dict(layer.state_dict())
))  # fmt: skip
class LongShort(Attention):
    """Attention with long heads first and short ones after them."""

    supports = Supports(cross=False)

    long_heads: int = option(
        "heads without a window; a quarter, at least one, unless given", at_least=0,
        factory=lambda layer: max(1, layer.heads // 4),
    )  # fmt: skip
    window: int = option(
        "keys before a query that its short heads see, its own among them; as many after it where "
        "the layer is not causal",
        default=128, at_least=1,
    )  # fmt: skip

    def setup(self) -> None:
        """Refuse more long heads than there are heads."""
        super().setup()
        if self.long_heads > self.heads:
            raise UserError(f"long_heads must lie in 0..heads={self.heads}, got {self.long_heads}")

    def mask(self, q: Tensor, k: Tensor, inputs: Inputs) -> Mask | Tensor | None:
        """Which pairs may meet, for each head."""
        pairs, near = super().mask(q, k, inputs), masks.window(self.window)
        if not isinstance(pairs, Tensor):
            return _Reach(pairs, near, self.long_heads, self.heads)
        reach = _Reach(None, near, self.long_heads, self.heads)
        return pairs & masks.dense(reach, q.shape[2], k.shape[2], device=q.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Long and short heads in a fused call each, so that short ones skip what they do not see."""
        mask = inputs.pairs
        long, group = self.long_heads, self.heads // self.kv_heads
        if isinstance(mask, Tensor):
            parts: tuple[Any, Any] = mask[:, :long], mask[:, long:]
        elif isinstance(mask, _Reach) and mask.left.heads is None:
            parts = mask.base, mask.near
        else:  # a pattern that tells heads apart by itself
            parts, long = (mask, None), self.heads
        if long % group:  # a key head of both kinds
            k, v, group = ops.repeated(k, q.shape[1]), ops.repeated(v, q.shape[1]), 1
        keys, kinds = k.shape[2], (slice(0, long), slice(long, self.heads))
        outs = [
            ops.attend(
                q[:, kind], k[:, kind.start // group : kind.stop // group],
                v[:, kind.start // group : kind.stop // group], mask=part, scale=self.scale,
                score_mod=inputs.by_positions(on_heads(self.score_mod, kind.start), keys),
                dropout=self.dropout if self.training else 0.0,
            )
            for kind, part in zip(kinds, parts, strict=True) if kind.start < kind.stop
        ]  # fmt: skip
        return torch.cat(outs, dim=1)


@torch.no_grad()
def largest_logits(layer: Attention, x: Tensor, **given: Any) -> Tensor:
    """Largest visible logit before the softmax, one a head [heads]; all pairs are held."""
    q, k, _, inputs = layer.prepare(x, **given)
    scores, visible = layer.score(q, k, inputs), inputs.visible(q, k)
    if (change := inputs.by_positions(layer.score_mod, k.shape[2])) is not None:
        scores = change(scores, *ops.indices(scores, k.shape[2] - q.shape[2]))
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.amax((0, 2, 3))
