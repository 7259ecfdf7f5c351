"""The patterns of the literature, each a few lines of arithmetic.

`causal`, `full`, `window`, `sinks`, `prefix`, `dilated`, `strided`, `block`, `document`, `padding`,
`keys`, `table`, `blocks`, `per_head`. Positions count from 0; sizes are in tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from attlas.errors import at_least_one
from attlas.masks.algebra import Coarse, HeadGroups, Mask, PerHead, Reach


class _ByValue(Mask):
    """A mask that its numbers tell from others: it rests on no tensor."""

    tensors = ()  # said outright, as compilers do not look through a frozen dataclass
    leaves = ()


@dataclass(frozen=True)
class _Full(_ByValue):
    relative = True

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q == q) & (k == k)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        yes = (q_lo == q_lo) & (k_lo == k_lo)
        return yes, yes

    def __repr__(self) -> str:
        return "full"


@dataclass(frozen=True)
class _Causal(_ByValue):
    relative = True

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        return k_lo <= q_hi, k_hi <= q_lo

    def __repr__(self) -> str:
        return "causal"


@dataclass(frozen=True, repr=False)
class _Window(_ByValue):
    size: int
    relative = True

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).abs() < self.size

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        nearest = torch.maximum(k_lo - q_hi, q_lo - k_hi)
        farthest = torch.maximum(q_hi - k_lo, k_hi - q_lo)
        return nearest < self.size, farthest < self.size

    def __repr__(self) -> str:
        return f"window({self.size})"


@dataclass(frozen=True, repr=False)
class _First(_ByValue):
    count: int
    name: str

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.count) & (q == q)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        some, every = k_lo < self.count, k_hi < self.count
        any_query = q_lo == q_lo
        return some & any_query, every & any_query

    def __repr__(self) -> str:
        return f"{self.name}({self.count})"


@dataclass(frozen=True, repr=False)
class _Strided(_ByValue):
    stride: int
    relative = True

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % self.stride == 0

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        low, high = q_lo - k_hi, q_hi - k_lo
        last = torch.div(high, self.stride, rounding_mode="floor") * self.stride
        return last >= low, (last == low) & (low == high) | (self.stride == 1)

    def __repr__(self) -> str:
        return f"strided({self.stride})"


class ByTensor(Mask):
    """A mask over a tensor: compared by identity, read where the indices are.

    Args:
        tensor: a user's, who may fill it anew.
        fixed: it was made here and stays as it is.
    """

    def __init__(self, tensor: Tensor, fixed: bool = False) -> None:
        self.held, self.fixed = tensor, fixed

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return () if self.fixed else (self.held,)

    @property
    def leaves(self) -> tuple[Mask, ...]:
        return (self,)

    def tensor(self, like: Tensor) -> Tensor:
        return self.held.to(like.device)


class _Document(ByTensor):
    def __init__(self, ids: Tensor) -> None:
        super().__init__(ids if ids.ndim == 2 else ids[None])
        self.batch = ids.shape[0] if ids.ndim == 2 else None

    def _at(self, b: Tensor, index: Tensor) -> Tensor:
        ids = self.tensor(index)
        inside = index.clamp(0, ids.shape[1] - 1)
        return ids[b if self.batch is not None else torch.zeros_like(b), inside]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self._at(b, q) == self._at(b, k)

    def _span(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest id of each block, on the grid's axes."""
        ids = self.tensor(lo)
        longest = int((hi - lo).max()) + 1
        index = torch.minimum(
            lo[..., None] + torch.arange(longest, device=lo.device), hi[..., None]
        )
        found = ids[:, index.clamp(0, ids.shape[1] - 1)]
        shape = _grid_shape(lo)
        return found.amin(-1).view(shape), found.amax(-1).view(shape)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        (q_min, q_max), (k_min, k_max) = self._span(q_lo, q_hi), self._span(k_lo, k_hi)
        alike = (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
        return (q_min <= k_max) & (k_min <= q_max), alike

    def __repr__(self) -> str:
        return f"document({tuple(self.held.shape)} ids)"


class Padding(ByTensor):
    """Keys that are valid tokens; see `padding`."""

    def __init__(self, valid: Tensor) -> None:
        super().__init__(valid)
        self.batch = valid.shape[0]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.tensor(k).bool()[b, k] & (q == q)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        total = torch.nn.functional.pad(self.tensor(k_lo).bool().cumsum(-1), (1, 0))
        last = total.shape[1] - 1
        count = total[:, (k_hi + 1).clamp(max=last)] - total[:, k_lo.clamp(max=last)]
        count = count.view(_grid_shape(k_lo))
        any_query = q_lo == q_lo
        return (count > 0) & any_query, (count == k_hi - k_lo + 1) & any_query

    def __repr__(self) -> str:
        return f"padding({tuple(self.held.shape)})"


class _Table(ByTensor):
    def __init__(self, pairs: Tensor, fixed: bool = False) -> None:
        super().__init__(pairs if pairs.ndim == 3 else pairs[None], fixed)
        self.heads = pairs.shape[0] if pairs.ndim == 3 else None

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        pairs = self.tensor(q).bool()
        rows, columns = pairs.shape[1:]
        inside = (q >= 0) & (q < rows) & (k < columns)
        head = h if self.heads is not None else torch.zeros_like(h)
        return pairs[head, q.clamp(0, rows - 1), k.clamp(max=columns - 1)] & inside

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        pairs = self.tensor(q_lo).bool()
        area = torch.nn.functional.pad(pairs.long().cumsum(1).cumsum(2), (1, 0, 1, 0))
        rows, columns = pairs.shape[1:]
        q0, q1 = q_lo.clamp(0, rows), (q_hi + 1).clamp(0, rows)
        k0, k1 = k_lo.clamp(max=columns), (k_hi + 1).clamp(max=columns)
        count = area[:, q1, k1] - area[:, q0, k1] - area[:, q1, k0] + area[:, q0, k0]
        return count > 0, count == (q_hi - q_lo + 1) * (k_hi - k_lo + 1)

    def __repr__(self) -> str:
        return f"table({tuple(self.held.shape)})"


#: Every pair.
full: Mask = _Full()
#: Keys up to the query's own position.
causal: Mask = _Causal()


def window(size: int) -> Mask:
    """Keys fewer than `size` tokens away on either side; with `causal`, the last `size` keys."""
    return _Window(at_least_one("size", size))


def sinks(count: int) -> Mask:
    """The first `count` keys (attention sinks), for every query."""
    return _First(at_least_one("count", count), "sinks")


def prefix(count: int) -> Mask:
    """The first `count` keys, for every query: `causal | prefix(n)` is a prefix language model."""
    return _First(at_least_one("count", count), "prefix")


def strided(stride: int) -> Mask:
    """Keys at distances that are multiples of `stride`."""
    return _Strided(at_least_one("stride", stride))


def dilated(size: int, dilation: int) -> Mask:
    """`size` keys a side, the query's own included, `dilation` tokens apart."""
    far = (at_least_one("size", size) - 1) * at_least_one("dilation", dilation) + 1
    return window(far) & strided(dilation)


def blocks(mask: Mask, size: int) -> Mask:
    """`mask` read on blocks of `size` tokens: q sees k where block q//size sees block k//size."""
    return Coarse(mask, at_least_one("size", size))


def block(size: int) -> Mask:
    """Keys of the query's own block of `size` tokens (chunked local attention)."""
    return blocks(window(1), size)


def document(ids: Integer[Tensor, "*batch tokens"]) -> Mask:
    """Keys of the query's own document; `ids` numbers each token's document (packed sequences)."""
    if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"ids takes integers [tokens] or [batch, tokens], got {ids.dtype} {tuple(ids.shape)}"
        )
    return _Document(ids)


def padding(valid: Bool[Tensor, "batch keys"]) -> Mask:
    """Keys that are valid tokens; `valid` is True at tokens and False at padding."""
    if valid.ndim != 2 or valid.is_floating_point():
        raise ValueError(f"valid takes booleans [batch, keys], got {valid.dtype} {tuple(valid.shape)}")
    return Padding(valid)


def keys(indices: Iterable[int], length: int) -> Mask:
    """The keys at `indices` of a sequence of `length`, for every query (global tokens)."""
    wanted = sorted(set(indices))
    if not wanted or wanted[0] < 0 or wanted[-1] >= length:
        raise ValueError(f"indices must lie in 0..{length - 1}, got {wanted[:8]}")
    pairs = torch.zeros(1, length, dtype=torch.bool)
    pairs[0, wanted] = True
    return _Table(pairs.expand(length, length), fixed=True)


def table(pairs: Bool[Tensor, "*heads queries keys"]) -> Mask:
    """Any pattern, pair by pair; beyond the table nothing is visible."""
    if pairs.ndim not in (2, 3) or pairs.is_floating_point():
        raise ValueError(
            "pairs takes booleans [queries, keys] or [heads, queries, keys], got "
            f"{pairs.dtype} {tuple(pairs.shape)}"
        )
    return _Table(pairs)


def fixed_table(pairs: Bool[Tensor, "heads queries keys"]) -> Mask:
    """A table that nobody will fill anew, so that what is worked out for it holds."""
    return _Table(pairs, fixed=True)


def per_head(*masks: Mask) -> Mask:
    """A mask for each query head, in order."""
    if not masks:
        raise ValueError("per_head takes at least one mask")
    return PerHead(tuple(masks))


def by_groups(mask: Mask, size: int) -> Mask:
    """A mask made for groups of heads, on the heads themselves: head h takes group h // size's."""
    return HeadGroups(mask, at_least_one("size", size))


def _grid_shape(ends: Tensor) -> tuple[int, ...]:
    """[batch, 1, q_blocks | 1, 1 | k_blocks], for block ends that are [n, 1] or [n]."""
    return (-1, 1, *(1,) * (2 - ends.ndim), *ends.shape)
