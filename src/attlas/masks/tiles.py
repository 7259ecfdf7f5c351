"""The tile simulator: how many tiles of pairs a neighbourhood touches, and the speedup that this allows.

An engine computes whole tiles of pairs, Tq queries by Tk keys. Where a tile is a box of the grid
(t_q and t_k tokens along each axis) the tiles that are touched factor:

    visited = Π over axes Σ over dilation groups and tiles of queries
                  ⌊last/t_k⌋ − ⌊first/t_k⌋ + 1      first, last: of the keys that the tile's queries see

Full attention of n tokens takes ⌈n/Tq⌉ ⌈n/Tk⌉ tiles, so that no more can be gained than the ratio. Where
every visited tile is visible throughout, the pattern is perfectly block-sparse for these tiles and
the ratio is that of the operations.

Source: "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attlas.errors import at_least_one
from attlas.masks.neighborhood import Axis

Tile = tuple[int, ...]


class Visits(NamedTuple):
    """What an engine does for a neighbourhood, in tiles and in pairs."""

    #: Tiles of pairs that are visited, and that full attention takes.
    visited: int
    full: int
    #: Pairs that are visible, and those of the visited tiles.
    visible: int
    computed: int
    #: Tokens of the grid.
    tokens: int

    @property
    def share(self) -> float:
        """Of the tiles of full attention, those that are visited."""
        return self.visited / self.full

    @property
    def speedup(self) -> float:
        """Over full attention, at best."""
        return self.full / self.visited

    @property
    def ideal(self) -> float:
        """Over full attention, if visible pairs alone were computed."""
        return self.tokens**2 / self.visible

    @property
    def whole(self) -> bool:
        """Whether no hidden pair is computed: perfectly block-sparse."""
        return self.visible == self.computed


@lru_cache(maxsize=4096)
def visits(axes: tuple[Axis, ...], q_tile: Tile, k_tile: Tile) -> Visits:
    """Tiles that a neighbourhood touches.

    Args:
        axes: of the neighbourhood.
        q_tile: queries of a tile along each axis.
        k_tile: keys of a tile along each axis.

    Raises:
        ValueError: a tile without a size of at least 1 for each axis.
    """
    for name, tile in (("q_tile", q_tile), ("k_tile", k_tile)):
        if len(tile) != len(axes):
            raise ValueError(f"{name} takes {len(axes)} sizes, one for each axis, got {tile}")
        for size in tile:
            at_least_one(name, size)
    tokens, queries, keys = (math.prod(n) for n in ((a.length for a in axes), q_tile, k_tile))
    sides = zip(axes, q_tile, k_tile, strict=True)
    visited = math.prod(_tiles(*side) for side in sides)
    full = -(-tokens // queries) * -(-tokens // keys)
    visible = math.prod(_tiles(axis, 1, 1) for axis in axes)
    return Visits(visited, full, visible, visited * queries * keys, tokens)


@lru_cache(maxsize=1024)
def _tiles(axis: Axis, q_tile: int, k_tile: int) -> int:
    """Pairs of tiles that are touched along one axis, in all dilation groups."""
    short, longer = divmod(axis.length, axis.dilation)
    total = 0
    for count, groups in ((short, axis.dilation - longer), (short + 1, longer)):
        lo = torch.arange(0, count, q_tile)
        first, last = _ends(axis, lo, (lo + q_tile - 1).clamp(max=count - 1), count)
        total += groups * int((last // k_tile - first // k_tile + 1).sum())
    return total


def _ends(axis: Axis, lo: Tensor, hi: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first and the last key that one of the queries lo..hi sees."""
    return axis.seen(lo, count)[0].clamp(min=0), axis.seen(hi, count)[1]


@lru_cache(maxsize=256)
def best_tiles(axes: tuple[Axis, ...], queries: int, keys: int) -> tuple[Tile, Tile]:
    """The tiles of so many queries and keys, powers of two, that touch the fewest tiles of pairs.

    A grid with fewer tokens in a dilation group has smaller tiles.

    Raises:
        ValueError: a number that is no power of two.
    """
    for name, value in (("queries", queries), ("keys", keys)):
        if at_least_one(name, value) & (value - 1):
            raise ValueError(f"{name} of a tile must be a power of two, got {value}")
    most = tuple((-(-a.length // a.dilation) - 1).bit_length() for a in axes)
    sizes = [min(value.bit_length() - 1, sum(most)) for value in (queries, keys)]
    pairs = ((q, k) for q in _shapes(sizes[0], most) for k in _shapes(sizes[1], most))
    return min(pairs, key=lambda pair: visits(axes, *pair).visited)


def _shapes(power: int, most: tuple[int, ...]) -> Iterator[Tile]:
    """All tiles of 2^power tokens with at most 2^most along each axis."""
    if len(most) == 1:
        if power <= most[0]:
            yield (1 << power,)
        return
    for first in range(min(power, most[0]) + 1):
        yield from ((1 << first, *rest) for rest in _shapes(power - first, most[1:]))
