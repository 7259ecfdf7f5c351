"""Padding in what runs along a sequence: the valid tokens of every row next to each other, and back.

A convolution, or a moving average taken by FFT, knows its neighbours by their distance, so that padding
between two tokens would set them apart. `ranks` tells each token's place among the valid ones of its row,
`place` puts tokens there, and `at_places` takes what was made of them back; `place_heads` and
`heads_at_places` do so with all heads of a token.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn


def ranks(valid: Bool[Tensor, "batch tokens"]) -> Integer[Tensor, "batch tokens"]:
    """Each valid token's number in its row, from 0; −1 at padding."""
    return (valid.long().cumsum(-1) - 1).masked_fill(~valid, -1)


def place(
    x: Float[Tensor, "batch tokens width"], at: Integer[Tensor, "batch tokens"],
    onto: Float[Tensor, "batch slots width"],
) -> Float[Tensor, "batch slots width"]:  # fmt: skip
    """`onto` with each token in its slot; those at −1 are left out."""
    slots = onto.shape[1]
    spare = torch.cat((onto, onto[:, :1]), dim=1)  # one more slot, for what is left out
    index = at.where(at >= 0, slots)[..., None].expand_as(x)
    return spare.scatter(1, index, x)[:, :slots]


def at_places(
    y: Float[Tensor, "batch slots width"], at: Integer[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens width"]:
    """What each token's slot holds; padding gets that of slot 0."""
    return y.gather(1, at.clamp(min=0)[..., None].expand(len(y), -1, y.shape[-1]))


def token_before(
    x: Float[Tensor, "batch tokens width"], valid: Bool[Tensor, "batch tokens"] | None = None,
    before: Float[Tensor, "batch one width"] | None = None,
) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch one width"]]:  # fmt: skip
    """(the valid token before each, the last of them for the next pass).

    Args:
        x: the tokens.
        valid: which of them are none of padding; all unless given.
        before: the token before the first, as the pass before returned it; zeros unless given.
    """
    before = torch.zeros_like(x[:, :1]) if before is None else before
    at = None if valid is None else ranks(valid)
    whole = torch.cat((before, x if at is None else place(x, at, torch.zeros_like(x))), dim=1)
    if at is None or valid is None:
        return whole[:, :-1], whole[:, -1:]
    return at_places(whole[:, :-1], at), at_places(whole, valid.sum(-1, keepdim=True))


def place_heads(
    x: Float[Tensor, "batch heads tokens width"], at: Integer[Tensor, "batch tokens"], slots: int
) -> Float[Tensor, "batch heads slots width"]:
    """Every head's tokens in their slots, and zeros elsewhere."""
    flat = rearrange(x, "b h t d -> b t (h d)")
    flat = place(flat, at, flat.new_zeros(len(flat), slots, flat.shape[-1]))
    return rearrange(flat, "b t (h d) -> b h t d", h=x.shape[1])


def heads_at_places(
    y: Float[Tensor, "batch heads slots width"], at: Integer[Tensor, "batch tokens"]
) -> Float[Tensor, "batch heads tokens width"]:
    """What each token's slot holds of every head."""
    at = at.clamp(min=0)[:, None, :, None]
    return y.gather(2, at.expand(len(y), y.shape[1], -1, y.shape[-1]))


def short_convolution(
    x: Float[Tensor, "batch tokens width"], conv: nn.Conv1d,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    before: Float[Tensor, "batch earlier width"] | None = None,
) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch earlier width"]]:  # fmt: skip
    """(a causal convolution over the valid tokens, the last of them for the next pass).

    Args:
        x: its input.
        conv: without padding of its own.
        valid: which tokens are none of padding; all unless given.
        before: what stands before the first token, as the pass before returned it; zeros unless given.
    """
    earlier = conv.kernel_size[0] - 1
    at = None if valid is None else ranks(valid)
    now = x if at is None else place(x, at, torch.zeros_like(x))
    before = x.new_zeros(len(x), earlier, x.shape[-1]) if before is None else before
    whole = torch.cat((before, now), dim=1)
    y = conv(whole.mT).mT
    if at is None or valid is None:
        return y, whole[:, whole.shape[1] - earlier :]
    last = valid.sum(-1, keepdim=True) + torch.arange(earlier, device=x.device)
    return at_places(y, at), at_places(whole, last)
