"""Masks as an algebra: `causal & (window(256) | sinks(4))`.

A mask says which query may meet which key, by position. Each mask answers two questions:

    visible(b, h, q, k)                 is this pair visible?      one boolean a pair
    reach(q_lo, q_hi, k_lo, k_hi)       in this block of pairs, is (some, every) pair visible?

The first makes the dense tensor, FlexAttention's `mask_mod` and the reference. The second is
arithmetic on the ends of intervals, and makes block-sparse forms without looking at any pair.
`some` may be too generous and `every` too shy, never the other way round. Under this reading

    (A & B):  some = someA & someB,   every = everyA & everyB
    (A | B):  some = someA | someB,   every = everyA | everyB
    (~A):     some = ~everyA,         every = ~someA

Shapes broadcast: b [B,1,1,1], h [H,1,1], q [Q,1], k [K]; interval ends q_* [nQ,1], k_* [nK].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

#: (some, every) of the blocks of a grid, each broadcastable to [batch, heads, q_blocks, k_blocks].
Reach: TypeAlias = tuple[Tensor, Tensor]


class Mask:
    """Which query may meet which key. Combine with `&`, `|`, `~`; `.T` swaps queries and keys."""

    #: Number of heads that the pattern tells apart; None when it is the same for all.
    heads: int | None = None
    #: Number of sequences that the pattern tells apart; None when it is the same for all.
    batch: int | None = None
    #: Whether it depends on q - k alone, so that shifting a sequence (left padding) changes nothing.
    relative: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the pattern itself rests on, whose contents may change."""
        return tuple(x for x in vars(self).values() if isinstance(x, Tensor))

    @property
    def leaves(self) -> tuple[Mask, ...]:
        """The masks in this one that no value but their tensors' tells apart, itself included."""
        by_identity = type(self).__hash__ is object.__hash__ or self.tensors
        return (self,) if by_identity else ()

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Boolean tensor over the broadcast of the index tensors; True where q may see k."""
        raise NotImplementedError

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        """(some, every) for each block of queries q_lo..q_hi and keys k_lo..k_hi, ends included."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        return And(self, _checked(other))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _checked(other))

    def __invert__(self) -> Mask:
        return Not(self)

    @property
    def T(self) -> Mask:  # noqa: N802  (as torch.Tensor.T)
        """The transposed pattern: q sees k where k saw q."""
        return Transpose(self)

    def picture(self, queries: int, keys: int | None = None) -> str:
        """The pattern of the first head as text, one row a query: ■ visible, · hidden."""
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.long)
        q = torch.arange(queries)[:, None]
        k = torch.arange(queries if keys is None else keys)
        grid = self.visible(zero, zero[0], q, k).expand(1, 1, len(q), len(k))[0, 0]
        return "\n".join("".join("■" if cell else "·" for cell in row) for row in grid.tolist())


def _checked(other: object) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(f"a mask combines with a mask, got {type(other).__name__}")
    return other


def _leaves(masks: Sequence[Mask]) -> tuple[Mask, ...]:
    return tuple(leaf for mask in masks for leaf in mask.leaves)


def _same(name: str, masks: Sequence[Mask]) -> int | None:
    sizes = {getattr(m, name) for m in masks} - {None}
    if len(sizes) > 1:
        raise ValueError(f"masks for different numbers of {name}: {sorted(sizes)}")
    return sizes.pop() if sizes else None


class _Pair(Mask):
    """What `And` and `Or` share."""

    symbol = "?"

    def __init__(self, left: Mask, right: Mask) -> None:
        self.left, self.right = left, right
        self.heads = _same("heads", (left, right))
        self.batch = _same("batch", (left, right))
        self.relative = left.relative and right.relative

    @property
    def leaves(self) -> tuple[Mask, ...]:
        return _leaves((self.left, self.right))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.left, self.right))

    def __repr__(self) -> str:
        return f"({self.left!r} {self.symbol} {self.right!r})"


class And(_Pair):
    """Pairs visible under both."""

    symbol = "&"

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.visible(b, h, q, k) & self.right.visible(b, h, q, k)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        a, b = (m.reach(q_lo, q_hi, k_lo, k_hi) for m in (self.left, self.right))
        return a[0] & b[0], a[1] & b[1]


class Or(_Pair):
    """Pairs visible under either."""

    symbol = "|"

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.visible(b, h, q, k) | self.right.visible(b, h, q, k)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        a, b = (m.reach(q_lo, q_hi, k_lo, k_hi) for m in (self.left, self.right))
        return a[0] | b[0], a[1] | b[1]


class _Over(Mask):
    """A mask made of one other."""

    def __init__(self, inner: Mask) -> None:
        self.inner = _checked(inner)
        self.heads, self.batch, self.relative = inner.heads, inner.batch, inner.relative

    @property
    def leaves(self) -> tuple[Mask, ...]:
        return self.inner.leaves

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.inner))


class Not(_Over):
    """Pairs hidden under the other."""

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ~self.inner.visible(b, h, q, k)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        some, every = self.inner.reach(q_lo, q_hi, k_lo, k_hi)
        return ~every, ~some

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


class Transpose(_Over):
    """The other with queries and keys swapped."""

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.visible(b, h, k, q)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        return self.inner.reach(k_lo, k_hi, q_lo, q_hi)

    def __repr__(self) -> str:
        return f"{self.inner!r}.T"


class Shifted(_Over):
    """The other for queries that stand `by` positions further on."""

    def __init__(self, inner: Mask, by: int) -> None:
        super().__init__(inner)
        self.by = by

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.visible(b, h, q + self.by, k)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        return self.inner.reach(q_lo + self.by, q_hi + self.by, k_lo, k_hi)

    def __hash__(self) -> int:
        return hash((type(self), self.inner, self.by))

    def __repr__(self) -> str:
        return f"shifted({self.inner!r}, {self.by})"


class Coarse(_Over):
    """The other on blocks of `size` tokens: q sees k where block q // size sees block k // size."""

    def __init__(self, inner: Mask, size: int) -> None:
        super().__init__(inner)
        self.size = size
        self.relative = False

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.visible(b, h, q // self.size, k // self.size)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        n = self.size
        return self.inner.reach(q_lo // n, q_hi // n, k_lo // n, k_hi // n)

    def __hash__(self) -> int:
        return hash((type(self), self.inner, self.size))

    def __repr__(self) -> str:
        return f"blocks({self.inner!r}, {self.size})"


class HeadGroups(_Over):
    """The other, made for groups of heads, on the heads: head h takes that of group h // size."""

    def __init__(self, inner: Mask, size: int) -> None:
        super().__init__(inner)
        self.size = size
        self.heads = None if inner.heads is None else inner.heads * size

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.visible(b, h // self.size, q, k)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        some, every = self.inner.reach(q_lo, q_hi, k_lo, k_hi)
        if self.inner.heads in (None, 1):
            return some, every
        return some.repeat_interleave(self.size, -3), every.repeat_interleave(self.size, -3)

    def __repr__(self) -> str:
        return f"by_groups({self.inner!r}, {self.size})"


@dataclass(frozen=True, eq=True)
class PerHead(Mask):
    """A mask for each head, in the order of the heads."""

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        for mask in self.masks:
            _checked(mask)
            if mask.heads is not None:
                raise ValueError(f"per_head takes masks that are the same for all heads: {mask!r}")
        object.__setattr__(self, "heads", len(self.masks))
        object.__setattr__(self, "batch", _same("batch", self.masks))
        object.__setattr__(self, "relative", all(m.relative for m in self.masks))

    @property
    def leaves(self) -> tuple[Mask, ...]:
        return _leaves(self.masks)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (h == 0) & self.masks[0].visible(b, h, q, k)
        for head, mask in enumerate(self.masks[1:], start=1):
            seen = seen | ((h == head) & mask.visible(b, h, q, k))
        return seen

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        reaches = [m.reach(q_lo, q_hi, k_lo, k_hi) for m in self.masks]
        shape = torch.broadcast_shapes(*(t.shape for r in reaches for t in r), (1, 1))

        def stacked(which: int) -> Tensor:
            return torch.cat([r[which].expand(*shape)[..., None, :, :] if len(shape) == 2
                              else r[which].expand(shape) for r in reaches], dim=-3)  # fmt: skip

        return stacked(0), stacked(1)
