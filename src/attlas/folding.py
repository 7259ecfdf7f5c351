"""Heads as fewer, wider heads, and back: how one tensor of a cache holds data of several widths."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def folded(x: Tensor, heads: int) -> Tensor:
    """Data of one or of n · heads heads, as that of `heads`."""
    if x.shape[1] == heads:
        return x
    if x.shape[1] < heads:
        return x.expand(-1, heads, -1, -1)
    return rearrange(x, "b (h n) t w -> b h t (n w)", h=heads)


def unfolded(x: Tensor, heads: int) -> Tensor:
    """What `folded` was given."""
    if heads <= x.shape[1]:
        return x if heads == x.shape[1] else x[:, :heads]
    return rearrange(x, "b h t (n w) -> b (h n) t w", n=heads // x.shape[1])
