"""A head's pattern at all scales: a grid of cells for the whole text, and what each query reads most.

    mass[I, J]   = Σ_{i ∈ I} Σ_{j ∈ J} A_ij / |I|      the share that the cell's queries give its keys
    maximum[I, J] = max_{i ∈ I, j ∈ J} A_ij

Cells are squares of 1, 2, 4 … tokens: as small as keeps the grid within 256 cells a side, or 1024 where
cells have `COARSE` tokens. Beside it stand, exact, all weights of a text of up to `WHOLE` tokens; of a
longer one each query's strongest keys, and what is left for all others. Built from blocks of rows;
memory is linear in the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

#: The most tokens whose weights are all kept, and strongest keys that are kept of each query.
WHOLE, STRONGEST = 512, 16
#: Cells a side, of small cells and from those of `COARSE` tokens on.
SMALL, LARGE, COARSE = 256, 1024, 16


@dataclass(frozen=True)
class Pyramid:
    """A head's pattern over `queries` × `keys` tokens.

    Attributes:
        queries: how many tokens ask.
        keys: how many tokens are read.
        cell: tokens a side of the grid's cells.
        mass: share of attention by cell, rows sum to what the weights do.
        maxima: the largest weight in each cell.
        whole: all weights; None of long texts.
        index: keys that each query reads most, in their order, -1 behind them; None beside `whole`.
        weight: their weights, exact.
        rest: what each query gives to all other keys.
    """

    queries: int
    keys: int
    cell: int
    mass: Float[Tensor, "rows columns"]
    maxima: Float[Tensor, "rows columns"]
    whole: Float[Tensor, "queries keys"] | None = None
    index: Int[Tensor, "queries strongest"] | None = None
    weight: Float[Tensor, "queries strongest"] | None = None
    rest: Float[Tensor, " queries"] | None = None

    @classmethod
    def of(cls, weights: Float[Tensor, "queries keys"]) -> Pyramid:
        """The pyramid of weights that are held."""
        builder = Builder()
        builder.add(weights)
        return builder.result()

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        held = (self.whole, self.index, self.weight, self.rest)
        return 2 * self.mass.numel() + sum(x.numel() for x in held if x is not None)

    def dense(self) -> Float[Tensor, "queries keys"]:
        """The weights, zeros where they are not known. Quadratic in the length."""
        if self.whole is not None:
            return self.whole
        assert self.index is not None
        assert self.weight is not None
        # One column more takes what stands behind a query's own.
        out = self.weight.new_zeros(self.queries, self.keys + 1)
        at = torch.where(self.index < 0, self.keys, self.index)
        return out.scatter_(1, at.long(), self.weight)[:, :-1]


class Builder:
    """Takes blocks of rows in their order; a later block may see more keys."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.queries, self.keys, self._cell = 0, 0, 1
        self._sums = torch.zeros(0, 0)
        self._maxima = torch.zeros(0, 0)
        self._whole: list[Tensor] | None = []
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, weights: Float[Tensor, "block keys"]) -> None:
        """The next rows."""
        weights = weights.detach().float()
        first, self.queries = self.queries, self.queries + weights.shape[0]
        self.keys = max(self.keys, weights.shape[1])
        self._kept.append(_strongest(weights))
        if self._whole is not None:
            self._whole.append(weights.cpu())
            if max(self.queries, self.keys) > WHOLE:
                self._whole = None
        while max(self.queries, self.keys) > self._cell * (SMALL if self._cell < COARSE else LARGE):
            self._coarsen()
        self._grow()
        self._add_cells(first, weights)

    def take_back(self, queries: int) -> None:
        """Forget all rows but the first; only where all weights are kept is the grid still known.

        Raises:
            ValueError: the rows are in cells already, which they cannot be taken out of.
        """
        if queries >= self.queries:
            return
        if self._whole is None:
            raise ValueError(f"rows of more than {WHOLE} tokens cannot be taken back from their cells")
        rows = _stacked(self._whole, self.keys)[:queries, :queries]
        self._clear()
        if len(rows):
            self.add(rows)

    def _coarsen(self) -> None:
        """Cells of twice the side."""
        self._cell *= 2
        self._sums = _pooled(self._sums, maxima=False)
        self._maxima = _pooled(self._maxima, maxima=True)

    def _grow(self) -> None:
        rows, columns = -(-self.queries // self._cell), -(-self.keys // self._cell)
        more = (0, columns - self._sums.shape[1], 0, rows - self._sums.shape[0])
        self._sums, self._maxima = F.pad(self._sums, more), F.pad(self._maxima, more)

    def _add_cells(self, first: int, weights: Tensor) -> None:
        cell, (rows, keys) = self._cell, weights.shape
        before, above = first // cell, first % cell
        # Rows and keys of cells that are not full are zeros, which change neither sums nor maxima.
        blocks = F.pad(weights, (0, -keys % cell, above, -(rows + above) % cell))
        blocks = blocks.unflatten(1, (-1, cell)).unflatten(0, (-1, cell))
        sums, maxima = blocks.sum(dim=(1, 3)).cpu(), blocks.amax(dim=(1, 3)).cpu()
        there = slice(before, before + sums.shape[0]), slice(sums.shape[1])
        self._sums[there] += sums
        self._maxima[there] = torch.maximum(self._maxima[there], maxima)

    def result(self) -> Pyramid:
        """What was built so far.

        Raises:
            ValueError: nothing was added.
        """
        if not self.queries:
            raise ValueError("a pattern needs at least one row of weights, got none")
        mass = self._sums / _heights(self.queries, self._cell)[:, None]
        known = self.queries, self.keys, self._cell, mass, self._maxima.clone()
        if self._whole is not None:
            return Pyramid(*known, whole=_stacked(self._whole, self.keys))
        index, weight, rest = (torch.cat(each) for each in zip(*self._kept, strict=True))
        return Pyramid(*known, index=index, weight=weight, rest=rest)


def _strongest(weights: Float[Tensor, "block keys"]) -> tuple[Tensor, Tensor, Tensor]:
    """(keys in their order, their weights, the rest) of each row; missing ones are -1 and 0."""
    count = min(STRONGEST, weights.shape[1])
    top = weights.topk(count, dim=1)
    keys = weights.shape[1]
    index, order = torch.where(top.values > 0, top.indices, keys).sort(dim=1)
    weight = top.values.gather(1, order)
    rest = (weights.sum(dim=1) - weight.sum(dim=1)).clamp(min=0)
    index = F.pad(index.masked_fill(index == keys, -1), (0, STRONGEST - count), value=-1)
    return index.int().cpu(), F.pad(weight, (0, STRONGEST - count)).cpu(), rest.cpu()


def coarser(
    mass: Float[Tensor, "rows columns"], maxima: Float[Tensor, "rows columns"], cell: int, queries: int
) -> tuple[Float[Tensor, "half halves"], Float[Tensor, "half halves"]]:
    """(mass, maxima) in cells of twice the side; the last row of cells may hold fewer queries."""
    sums = _pooled(mass * _heights(queries, cell)[:, None], maxima=False)
    return sums / _heights(queries, 2 * cell)[:, None], _pooled(maxima, maxima=True)


def _heights(queries: int, cell: int) -> Float[Tensor, " rows"]:
    """Queries in each row of cells."""
    return (queries - torch.arange(0, queries, cell)).clamp(max=cell).float()


def _pooled(x: Float[Tensor, "rows columns"], maxima: bool) -> Float[Tensor, "half halves"]:
    """Two by two cells in one."""
    if not x.numel():
        return x
    blocks = F.pad(x, (0, x.shape[1] % 2, 0, x.shape[0] % 2))
    blocks = blocks.unflatten(1, (-1, 2)).unflatten(0, (-1, 2))
    return blocks.amax(dim=(1, 3)) if maxima else blocks.sum(dim=(1, 3))


def _stacked(blocks: list[Tensor], keys: int) -> Tensor:
    """Blocks of rows one above the other, zeros behind the shorter ones."""
    return torch.cat([F.pad(block, (0, keys - block.shape[1])) for block in blocks])
