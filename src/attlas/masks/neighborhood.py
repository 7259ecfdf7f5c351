"""Neighbourhoods on a grid of 1, 2 or 3 axes: each query sees the keys nearest to it, axis by axis.

Along an axis of length L with window w, dilation d and stride s, a token at x belongs to the dilation
group g = x mod d of n = ⌈(L − g)/d⌉ tokens, in which it is number y = ⌊x/d⌋. The s queries of a stride
group share the window of their leader:

    leader = min(s ⌊y/s⌋ + ⌊s/2⌋, n − 1)        first = clamp(leader − ⌊w/2⌋, 0, n − w)
    visible keys: those of the same group with first ≤ y' < first + w      always w of them

and along a causal axis

    leader = min(s ⌊y/s⌋ + s − 1, n − 1)        visible keys: leader − w < y' ≤ y

Over several axes a key is visible if it is so along each of them. s = 1 is the sliding window, s = w
blocked attention where w divides the axis, w = L full attention.

Tokens are row-major, or in an `Order` of tiles: those of a tile follow one another, so that engines
that work on blocks of neighbouring tokens visit few of them.

Cost: of n tokens each sees Π w keys, O(n Π w).
Source: "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from attlas.errors import at_least_one
from attlas.masks.algebra import Mask, Reach

T = TypeVar("T", int, bool)


class Axis(NamedTuple):
    """A neighbourhood along one axis."""

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def members(self, group: Tensor) -> Tensor | int:
        """Tokens of a dilation group."""
        if self.length % self.dilation == 0:
            return self.length // self.dilation
        return (self.length - group + self.dilation - 1) // self.dilation

    def seen(self, y: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
        """(first, last) key that query number y of a group of `count` sees; neither falls as y grows.

        Numbers behind the group's last, which pad tiles, see what a causal or the last query would.
        """
        start = y // self.stride * self.stride
        if self.causal:
            return _at_most(start + self.stride - 1, count, -1) - (self.window - 1), y
        leader = _at_most(start + self.stride // 2, count, -1)
        first = _at_most((leader - self.window // 2).clamp(min=0), count, -self.window)
        return first, first + self.window - 1


def _at_most(x: Tensor, count: Tensor | int, more: int) -> Tensor:
    limit = count + more
    return torch.minimum(x, limit) if isinstance(limit, Tensor) else x.clamp(max=limit)


class Span(NamedTuple):
    """Between which dilation groups and numbers within them tokens lie, ends included."""

    group_lo: Tensor
    group_hi: Tensor
    lo: Tensor
    hi: Tensor


class Order(NamedTuple):
    """In which order the tokens of a grid stand.

    Row-major without a `tile`. With one, the dilation groups follow one another, in each of them its
    tiles, in each of these its tokens, each time row by row; tiles that reach beyond the grid are
    filled up.
    """

    shape: tuple[int, ...]
    dilation: tuple[int, ...]
    tile: tuple[int, ...] | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """How many values each digit of a token's place has, the first digit first."""
        if self.tile is None:
            return self.shape
        longest = [-(-n // d) for n, d in zip(self.shape, self.dilation, strict=True)]
        tiles = [-(-n // t) for n, t in zip(longest, self.tile, strict=True)]
        return (*self.dilation, *tiles, *self.tile)

    @property
    def tokens(self) -> int:
        """All places, those that fill tiles up included."""
        return math.prod(self.counts)

    def digits(self, index: Tensor) -> list[Tensor]:
        """The digits of places; the first grows without end."""
        found = []
        for count in reversed(self.counts[1:]):
            found.append(index % count)
            index = index // count
        return [index, *reversed(found)]

    def places(self, index: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(group, number within it) of tokens along each axis."""
        digits, axes = self.digits(index), len(self.shape)
        if self.tile is None:
            return [(x % d, x // d) for x, d in zip(digits, self.dilation, strict=True)]
        return [
            (digits[a], digits[axes + a] * t + digits[2 * axes + a]) for a, t in enumerate(self.tile)
        ]

    def spans(self, lo: Tensor, hi: Tensor) -> list[Span]:
        """Between which places the tokens lo..hi stand along each axis: a box that holds them all."""
        ends, shared = [], lo == lo
        for first, last, count in zip(self.digits(lo), self.digits(hi), self.counts, strict=True):
            # Behind the first digit that differs every value may come.
            ends.append((torch.where(shared, first, 0), torch.where(shared, last, count - 1)))
            shared = shared & (first == last)
        if self.tile is None:
            return [self._of_row(*e, d) for e, d in zip(ends, self.dilation, strict=True)]
        axes = len(self.shape)
        found = []
        for a, t in enumerate(self.tile):
            (g_lo, g_hi), (t_lo, t_hi), (o_lo, o_hi) = ends[a], ends[axes + a], ends[2 * axes + a]
            found.append(Span(g_lo, g_hi, t_lo * t + o_lo, t_hi * t + o_hi))
        return found

    def _of_row(self, lo: Tensor, hi: Tensor, dilation: int) -> Span:
        one = lo // dilation == hi // dilation  # else every group may come
        groups = torch.where(one, lo % dilation, 0), torch.where(one, hi % dilation, dilation - 1)
        return Span(*groups, lo // dilation, hi // dilation)

    def row_major(self) -> Int[Tensor, " places"]:
        """The row-major token of each place, −1 where it fills up."""
        token = torch.zeros(self.tokens, dtype=torch.long, device="cpu")
        inside = torch.ones_like(token, dtype=torch.bool)
        places = self.places(torch.arange(self.tokens, device="cpu"))
        for (group, y), n, d in zip(places, self.shape, self.dilation, strict=True):
            at = group + y * d
            token, inside = token * n + at, inside & (at < n)
        return token.where(inside, -1)


class Neighborhood(Mask):
    """The pattern, for queries and keys that stand in some order each."""

    tensors = ()
    leaves = ()

    def __init__(self, axes: tuple[Axis, ...], queries: Order, keys: Order) -> None:
        self.axes, self.queries, self.keys = axes, queries, keys

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.axes, self.queries, self.keys))

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q == q) & (k == k)
        places = zip(self.axes, self.queries.places(q), self.keys.places(k), strict=True)
        for axis, (group, y), (other, number) in places:
            count = axis.members(group)
            first, last = axis.seen(y, count)
            seen = seen & (group == other) & (number >= first) & (number <= last)
            if axis.causal:  # else the last key seen lies within the grid
                seen = seen & (number < count)
        return seen

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        some = every = (q_lo == q_lo) & (k_lo == k_lo)
        spans = zip(
            self.axes, self.queries.spans(q_lo, q_hi), self.keys.spans(k_lo, k_hi), strict=True
        )
        for axis, q, k in spans:
            longest, shortest = axis.members(q.group_lo), axis.members(q.group_hi)
            some = some & (q.group_lo <= k.group_hi) & (k.group_lo <= q.group_hi) & (k.lo < longest)
            some = some & (k.hi >= axis.seen(q.lo, shortest)[0])
            some = some & (k.lo <= axis.seen(q.hi, longest)[1])
            every = every & (q.group_lo == q.group_hi) & (k.group_lo == q.group_lo)
            every = every & (k.group_hi == q.group_hi) & (k.hi < longest)
            every = every & (k.lo >= axis.seen(q.hi, longest)[0])
            every = every & (k.hi <= axis.seen(q.lo, longest)[1])
        return some, every

    def __repr__(self) -> str:
        told = [f"{a.length}:{a.window}" for a in self.axes]
        return f"neighborhood({' × '.join(told)})"


def neighborhood(
    shape: int | Sequence[int],
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Neighborhood:
    """The keys nearest to each query on a grid whose tokens are row-major.

    Args:
        shape: tokens along each of 1 to 3 axes.
        window: keys that a query sees along each axis; one number is for all axes, here and below.
        stride: queries that share a window, at most `window`.
        dilation: tokens from one visible key to the next.
        causal: whether an axis shows earlier keys alone.

    Raises:
        ValueError: other than 1 to 3 axes, a window that its dilation spreads beyond the grid, or a
            stride that would leave keys unseen.
    """
    axes = axes_of(shape, window, stride, dilation, causal)
    order = Order(tuple(a.length for a in axes), tuple(a.dilation for a in axes))
    return Neighborhood(axes, order, order)


def axes_of(
    shape: int | Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> tuple[Axis, ...]:
    """The neighbourhood along each axis, checked; see `neighborhood`."""
    lengths = (shape,) if isinstance(shape, int) else tuple(shape)
    if not 1 <= len(lengths) <= 3:
        raise ValueError(f"shape takes the lengths of 1 to 3 axes, got {shape}")
    count = len(lengths)
    flags = _each("causal", causal, count)
    if not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"causal takes True or False, or one for each axis, got {causal}")
    windows, strides = _each("window", window, count), _each("stride", stride, count)
    dilations = _each("dilation", dilation, count)
    sizes = {"shape": lengths, "window": windows, "stride": strides, "dilation": dilations}
    for name, values in sizes.items():
        for value in values:
            at_least_one(name, value)
    for length, wide, step, apart in zip(lengths, windows, strides, dilations, strict=True):
        if wide * apart > length:
            raise ValueError(
                f"window={windows} times dilation={dilations} must fit shape={lengths}, along each axis"
            )
        if step > wide:
            raise ValueError(
                f"stride={strides} must be at most window={windows}, along each axis: keys between two "
                "windows would be seen by nobody"
            )
    told = zip(lengths, windows, strides, dilations, flags, strict=True)
    return tuple(Axis(*each) for each in told)


def _each(name: str, value: T | Sequence[T], count: int) -> tuple[T, ...]:
    """One value for each axis."""
    if not isinstance(value, Sequence):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{name} takes one value, or {count} for the axes of shape, got {tuple(value)}")
    return tuple(value)
