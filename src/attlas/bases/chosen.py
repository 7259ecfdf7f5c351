"""Attention to blocks that were chosen and to a window, over what keys and values are made of.

What a layer's cache keeps may be no keys and values: `keys_of` and `values_of` make them, of those tokens
alone that are looked at.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas import masks, ops
from attlas.attention import Attention
from attlas.bases.blocks import Blocks
from attlas.bases.compression import aligned
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.ops.reference import taken
from attlas.tracing import traced


class Chosen(Attention):
    """A causal layer that reads blocks by lists, those of a group's heads alike, and a window.

    Attributes:
        selected: tokens of a block that lists speak of.
        window: tokens of the window, the query's own among them; None where there is none.
    """

    selected: int
    window: int | None

    def keys_of(self, k: Tensor) -> Float[Tensor, "batch kv_heads keys key"]:
        """Keys, from what a cache keeps of them."""
        return k

    def values_of(self, v: Tensor) -> Float[Tensor, "batch kv_heads keys value"]:
        """Values, from what a cache keeps of them."""
        return v

    def blocks(self, q: Tensor, k: Tensor, inputs: Inputs, size: int) -> Blocks:
        """Blocks of so many of a row's tokens.

        Raises:
            ValueError: a cache that has left keys out.
        """
        if inputs.key_positions.shape[-1] != k.shape[2]:
            raise UserError(
                f"cache: blocks are of all tokens, and {k.shape[2]} keys are left of "
                f"{inputs.key_positions.shape[-1]}"
            )
        return Blocks.of(inputs, q, k, size)

    def read(
        self, q: Tensor, k: Tensor, v: Tensor,
        chosen: Int[Tensor, "batch kv_heads queries count"], inputs: Inputs,
    ) -> Float[Tensor, "batch heads queries value"]:  # fmt: skip
        """Attention to the tokens of chosen blocks, which a group reads once."""
        dropped, valid = self.training and self.dropout > 0, inputs.valid
        if q.shape[2] == 1 and not traced():
            return self.read_alone(q, k, v, chosen, inputs)
        apart = valid is not None and q.shape[2] < k.shape[2]  # rows whose queries stand elsewhere
        if traced() or dropped or apart or not len(q):
            pairs = self.chosen_pairs(q, k, chosen, inputs)
            return self.fused(q, self.keys_of(k), self.values_of(v), replace(inputs, pairs=pairs))
        q, k, v, chosen = (aligned(x, inputs) for x in (q, k, v, chosen + 1))
        out = ops.block_sparse(
            q, self.keys_of(k), self.values_of(v), chosen - 1, size=(1, self.selected),
            mask=masks.causal, scale=self.scale,
        )  # fmt: skip
        if valid is None:
            return out
        rank = self.blocks(q, k, inputs, 1).of_queries
        return out.gather(2, rank[:, None, :, None].expand_as(out))

    def read_alone(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, inputs: Inputs) -> Tensor:
        """The same for a lone query, as in a step of decoding: nothing but those tokens is looked at."""
        at = chosen.mT * self.selected + torch.arange(self.selected, device=q.device)
        seen = (chosen.mT >= 0) & (at <= self.blocks(q, k, inputs, 1).of_queries[:, None, :, None])
        at, seen = (at.masked_fill(~seen, 0).flatten(2), seen.flatten(2))
        if inputs.valid is not None:
            slots = (~inputs.valid).long().sort(dim=1, stable=True).indices
            at = slots[:, None].expand(-1, at.shape[1], -1).gather(2, at)
        k, v = (taken(x, at) for x in (k, v))
        pairs = ops.repeated(seen, self.heads)[:, :, None]
        return self.fused(q, self.keys_of(k), self.values_of(v), replace(inputs, pairs=pairs))

    def chosen_pairs(
        self, q: Tensor, k: Tensor, chosen: Tensor, inputs: Inputs
    ) -> Bool[Tensor, "batch heads queries keys"]:
        """The pairs of chosen blocks as booleans."""
        blocks, each = self.blocks(q, k, inputs, self.selected), ops.repeated(chosen, self.heads)
        return dense_of(blocks.seen(each, dense_of(inputs.pairs, q, k)), q, k)

    def near(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Attention to the window."""
        k, v = (self.last(x, q.shape[2], inputs) for x in (k, v))
        k, v = self.keys_of(k), self.values_of(v)
        return self.fused(q, k, v, replace(inputs, pairs=self.near_mask(q, k, inputs)))

    def last(self, x: Tensor, queries: int, inputs: Inputs) -> Tensor:
        """What the tokens have that so many last queries may see in their windows; all where padding
        stands between them."""
        assert self.window is not None
        return x if inputs.gaps else x[:, :, -(queries + self.window - 1) :]

    def near_mask(self, q: Tensor, k: Tensor, inputs: Inputs) -> Mask | Tensor | None:
        """The pairs of the window."""
        assert self.window is not None
        return inputs.within(masks.both(self.pattern, masks.window(self.window)), q, k)


def dense_of(
    pairs: Mask | Tensor | None, q: Tensor, k: Tensor
) -> Bool[Tensor, "b h queries keys"]:
    """Pairs that a causal layer sees, as booleans."""
    found = ops.as_dense(pairs, q.shape[2], k.shape[2], k.shape[2] - q.shape[2], q.device)
    assert found is not None
    return found
