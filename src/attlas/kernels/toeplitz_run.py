"""Calls of the kernels of `attlas.kernels.toeplitz`: tiles by width, and how the work is cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import units
from attlas.kernels.toeplitz import LOG2E, _gather, _rows, _stripes

#: Sums of tiles that are held at a time, in numbers: 256 MiB. More heads come one after the other.
HELD = 1 << 26
#: Programs that a multiprocessor should get, of unlike length: enough that the last ones matter little.
PROGRAMS = 16
#: Tiles that a program walks through at least, beside which it is little to write one tile of sums.
LEAST = 8


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, the former a multiple of the latter, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Work:
    """The visible tiles of a mask, by stripes; one list for each pattern that it tells apart.

    Attributes:
        rows: of each tile, the number of its block of queries.
        cut: of each tile, which of `seen` tells its pairs; only of those that the mask cuts.
        seen: pairs of the tiles that the mask cuts [cut tiles, queries, keys], as bytes.
        items: [items, 4]: the stripe, where its tiles begin, where those begin that are cut, and the end.
        order: items of each pattern, the longest first.
        slots: of each item, its place in that order.
        begins: where the items of each pattern begin, and the end.
        stripes: where the items of each stripe of each pattern begin, and the end.
        count: stripes of a pattern, all that there may be.
        least: number of keys' blocks by which the first stripe's keys stand behind its queries, negative.
        most: items of the pattern that has most.
        by: whether patterns are told apart by rows of the batch, and by heads.
    """

    rows: Tensor
    cut: Tensor
    seen: Tensor
    items: Tensor
    order: Tensor
    slots: Tensor
    begins: Tensor
    stripes: Tensor
    count: int
    least: int
    most: int
    by: tuple[bool, bool]


def tile_of(width: int, itemsize: int) -> Tile:
    """The tile for heads of this width."""
    if itemsize > 2:  # whose products are not made by tensor cores
        return Tile(32, 32, 4, 1) if width <= 64 else Tile(16, 16, 4, 1)
    if width > 128:
        return Tile(64, 64, 8, 1)
    return Tile(64, 32, 4, 2, 128) if width <= 64 else Tile(128, 64, 8, 2)


def walked(tiles: int, device: torch.device) -> int:
    """Tiles of an item, of so many that all heads and rows of a batch have."""
    return max(LEAST, tiles // (PROGRAMS * units(device)))


def gradient(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, out: Tensor, lse: Tensor, d_out: Tensor | None,
    d_lse: Tensor | None, work: Work, tile: Tile, scale: float, offset: int,
) -> Tensor:  # fmt: skip
    """The gradient of a table of biases [heads, distances], the distance 0 in the middle.

    Args:
        q: queries [batch, heads, queries, dk], numbers of a row behind one another, as of all of them.
        k: keys.
        v: values, of as many heads.
        table: the biases.
        out: outputs [batch, heads, queries, dv].
        lse: log Σ exp(scores), contiguous in float32.
        d_out: gradient of out; None where it has none.
        d_lse: that of lse, contiguous in float32; None where it has none.
        work: the visible tiles of the mask.
        tile: their size.
        scale: of the products.
        offset: position of the first query.
    """
    (batch, heads, queries, dk), keys, dv = q.shape, k.shape[2], v.shape[3]
    width, wide = table.shape[1], max(16, triton.next_power_of_2(dv))
    delta, top = torch.empty_like(lse), torch.empty_like(lse)
    size = max(1, min(64, 8192 // wide))
    d_y = out.new_zeros(1).expand(out.shape) if d_out is None else d_out
    _rows[triton.cdiv(queries, size), batch * heads](
        out, d_y, lse, d_lse, delta, top, heads, queries, *out.stride()[:3], *d_y.stride()[:3],
        dv=dv, DV=wide, ROWS=size, OUT=d_out is not None, LSE=d_lse is not None,
    )  # fmt: skip
    by_batch, by_head = work.by
    local = max(1, min(heads, HELD // (work.most * tile.queries * tile.keys)))
    wanted = PROGRAMS * units(q.device)
    each = 1 if by_batch else max(1, min(batch, work.most * heads * batch // wanted))
    pieces = triton.cdiv(batch, each)
    sums = torch.empty(pieces, local, work.most, tile.queries, tile.keys, device=q.device)
    d_table = torch.empty_like(table, memory_format=torch.contiguous_format)
    edge = width // 2 - offset + work.least * tile.keys
    table = table.contiguous()
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    across = min(64, tile.keys)
    for first in range(0, heads, local):
        here = min(local, heads - first)
        _stripes[work.most, here, pieces](
            q, k, v, d_y, top, delta, table, work.rows, work.cut, work.seen, work.items, work.order,
            work.begins, sums, first, heads, heads // k.shape[1], batch, each, queries, keys, width, edge,
            work.least, work.most, scale * LOG2E.value, *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], *d_y.stride()[:3], dk=dk, dv=dv, DK=max(16, triton.next_power_of_2(dk)),
            DV=wide, BQ=tile.queries, BK=tile.keys, BY_BATCH=by_batch, BY_HEAD=by_head,
            PRECISION="ieee" if exact else "tf32", num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=tile.registers,
        )  # fmt: skip
        _gather[triton.cdiv(width, across), here](
            sums, work.items, work.slots, work.stripes, d_table, first, heads, pieces, here, width, edge,
            work.most, work.count, BQ=tile.queries, BK=tile.keys, X=across, R=min(16, tile.queries),
            BY_BATCH=by_batch, BY_HEAD=by_head,
        )  # fmt: skip
    return d_table
