"""What a query can gain from each page of keys, and the best pages, without a sort.

    bound  = Σ_d max(q_d · low_d, q_d · high_d) = q⁺ · high + q⁻ · low        the group's largest
    chosen = the `count` highest: those above the count-th, and the first of those equal to it

Scores: a program reads a run of summaries once for all heads of the group. Choice: a program keeps a
row's scores as integers of the same order and asks how many reach either of two bars, which cut their
range to a third, until `count` do; a running count of those chosen is then the place where a page's
number is written, so that they come ascending. How many pages a row has, and how many of them it is to
have, is worked out there too: it may be known on the device alone.

Cost: 2 · dim numbers read and one float32 written a page; then at most 21 passes over a row's scores
in registers, about eight where they differ.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import memory, room, units

#: Pages of a block where they are 128 wide, its pipeline's stages, and programs on each multiprocessor.
PAGES, STAGES, PROGRAMS = 64, 3, 3
#: Rows of scores start at multiples of so many, so that they are read four at a time.
ROW = 16


# It is compiled for strides that are multiples of sixteen: what is known to be aligned is loaded
# sixteen bytes at a time, and ahead.
@triton.jit(do_not_specialize=["heads", "pages", "run"])
@no_type_check
def _bounds(
    q, low, high, out, heads, pages, run, out_n,
    q_b, q_h, low_b, low_h, low_n, high_b, high_h, high_n,
    DIM: tl.constexpr, DIM_ROOM: tl.constexpr, ROWS: tl.constexpr, PAGES: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Bounds of one run of pages, for the heads of one group."""
    kv_head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(0)
    group = heads // kv_heads
    row, c = tl.arange(0, ROWS), tl.arange(0, DIM_ROOM)
    valid, head = row < group, kv_head * group + row
    asked = tl.load(
        (q + batch * q_b + head.to(tl.int64) * q_h)[:, None] + c[None, :],
        mask=valid[:, None] & (c < DIM)[None, :], other=0.0,
    )  # fmt: skip
    above, below = tl.maximum(asked, 0.0).to(low.dtype.element_ty), tl.minimum(asked, 0.0)
    below = below.to(low.dtype.element_ty)
    low += batch * low_b + kv_head.to(tl.int64) * low_h
    high += batch * high_b + kv_head.to(tl.int64) * high_h
    begin = tl.program_id(1) * run
    for start in range(begin, tl.minimum(begin + run, pages), PAGES):
        page = start + tl.arange(0, PAGES)
        far = page.to(tl.int64)
        wide = (page < pages)[:, None] & (c < DIM)[None, :]
        least = tl.load((low + far * low_n)[:, None] + c[None, :], mask=wide, other=0.0)
        most = tl.load((high + far * high_n)[:, None] + c[None, :], mask=wide, other=0.0)
        bound = tl.dot(above, tl.trans(most), input_precision="ieee")
        bound = tl.dot(below, tl.trans(least), bound, input_precision="ieee")
        if SHARED:
            best = tl.max(tl.where(valid[:, None], bound, float("-inf")), 0)
            at = out + (batch * kv_heads + kv_head) * out_n + far
            tl.store(at, best, mask=page < pages)
        else:
            at = out + ((batch * heads + head) * out_n)[:, None] + far[None, :]
            tl.store(at, bound, mask=valid[:, None] & (page < pages)[None, :])


@triton.jit(do_not_specialize=["pages", "count", "page", "each", "lengths_b", "lengths_h"])
@no_type_check
def _choice(
    scores, lengths, out, pages, count, page, each, scores_b, scores_h, lengths_b, lengths_h,
    BLOCK: tl.constexpr, FOURS: tl.constexpr, KEEP: tl.constexpr, NEWEST: tl.constexpr,
):  # fmt: skip
    """Numbers of one row's `count` highest scores, ascending; of the pages that its tokens fill."""
    head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = tl.arange(0, BLOCK)
    # Four scores are read together where they are aligned; those behind the last are not looked at.
    read = tl.cdiv(pages, 4) * 4 if FOURS else pages
    scores += batch * scores_b + head.to(tl.int64) * scores_h
    score = tl.load(scores + number, mask=number < read, other=0.0)
    out += (batch * tl.num_programs(0) + head) * count
    tl.store(out + number, -1, mask=number < count)
    if lengths is not None:
        lengths += batch * lengths_b + (head // each).to(tl.int64) * lengths_h
        pages = tl.minimum(pages, tl.cdiv(tl.load(lengths).to(tl.int32), page))
        if KEEP > 0:
            wanted = ((pages + NEWEST).to(tl.float64) * KEEP).to(tl.int32) - NEWEST
            count = tl.minimum(count, tl.maximum(wanted, 1))
        count = tl.minimum(count, pages)

    there = number < pages
    score = tl.where(score == 0.0, 0.0, score)  # −0 is no less than 0
    bits = score.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    # The largest bar that at least `count` reach lies in [least, most]; `above` lie higher than most.
    least = tl.min(tl.where(there, order, 0xFFFFFFFF), 0)
    order = tl.where(there, order, 0)
    most = tl.max(order, 0)
    above = 0
    while least < most:
        third = (most - least - 1) // 3
        lower, upper = least + third + 1, most - third
        # Both counts in one number: at most 2¹⁴ each.
        both = tl.sum((order >= lower).to(tl.int32) + ((order >= upper).to(tl.int32) << 16), 0)
        some, few = both & 0xFFFF, both >> 16
        enough, plenty = some >= count, few >= count
        # Once just `count` reach a bar they are those, whatever lies between it and them.
        just = tl.where(plenty, few, some) == count
        above = tl.where(plenty, above, tl.where(enough, few, some))
        most = tl.where(plenty, most, tl.where(enough, upper, lower) - 1)
        least = tl.where(plenty, upper, tl.where(enough, lower, least))
        above, most = tl.where(just, count, above), tl.where(just, least - 1, most)

    higher = order > most
    equal = (order == least) & (least == most)
    steps = tl.cumsum(higher.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    spare = count - above
    ahead, level = steps & 0xFFFF, steps >> 16
    finite = (order > 0x007FFFFF) & (order <= 0xFF800000)  # −∞ and NaN as integers of this order
    chosen = (higher | (equal & (level <= spare))) & there & finite
    # In 16 bits it changes threads, of which each then writes numbers that lie side by side.
    place = tl.where(chosen, ahead + tl.minimum(level, spare) - 1, -1).to(tl.int16).to(tl.int32)
    tl.debug_barrier()  # all is −1 by now
    tl.store(out + place, number, mask=place >= 0)


def score(q: Tensor, low: Tensor, high: Tensor, *, shared: bool) -> Tensor:
    """Bounds in float32: [batch, kv_heads, pages] when `shared`, else [batch, heads, pages].

    Args:
        q: one query of each head, [batch, heads, 1, dim].
        low: elementwise minimum of each page's keys, [batch, kv_heads, pages, dim].
        high: their maximum.
        shared: give the largest bound of the heads that share keys.
    """
    batch, heads, _, dim = q.shape
    kv_heads, pages = low.shape[1:3]
    row = -(-pages // ROW) * ROW
    out = q.new_empty((batch, kv_heads if shared else heads, row), dtype=torch.float32)
    rows = room(heads // kv_heads)
    block, stages = tiles(room(dim), rows, memory(q.device))
    blocks = triton.cdiv(pages, block)
    wanted = max(1, units(q.device) * PROGRAMS // (batch * kv_heads))
    run = triton.cdiv(blocks, min(wanted, blocks)) * block
    _bounds[kv_heads, triton.cdiv(pages, run), batch](
        q, low, high, out, heads, pages, run, row, *q.stride()[:2], *low.stride()[:3],
        *high.stride()[:3], DIM=dim, DIM_ROOM=room(dim), ROWS=rows, PAGES=block, SHARED=shared,
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out[..., :pages]


def tiles(dim: int, rows: int, shared: int) -> tuple[int, int]:
    """(Pages of a block, stages) that leave room for the queries in so much shared memory."""
    pages = max(16, PAGES * 128 // max(128, dim))
    left = shared - rows * (4 * dim + 4 * pages)
    return pages, max(1, min(STAGES, 1 + left // (4 * pages * dim)))


def choose(
    scores: Tensor, count: int, lengths: Tensor | None = None, page: int = 1,
    keep: float | None = None, newest: int = 0,
) -> Tensor:  # fmt: skip
    """Numbers of the `count` highest of each row, ascending, int32; −1 where the score is −∞ or NaN.

    Args:
        scores: of all pages, [batch, heads, pages].
        count: how many at most.
        lengths: tokens of each row in the first pages, [batch, kv_heads] on the device; all pages are
            there unless given. −1 stands behind those that are chosen of a shorter row.
        page: tokens of a page.
        keep: share of a row's pages, and of so many `newest` beside them, that is chosen; `count` or
            all unless given.
        newest: pages that are read beside these, and count among those that `keep` asks for.
    """
    batch, heads, pages = scores.shape
    out = scores.new_empty((batch, heads, count), dtype=torch.int32)
    if not count:
        return out
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    # Sixteen bytes that start aligned never reach beyond memory that is allocated.
    fours = not (scores.data_ptr() % 16 or scores.stride(0) % 4 or scores.stride(1) % 4)
    block = triton.next_power_of_2(pages)
    each = 1 if lengths is None else heads // lengths.shape[1]
    strides = (0, 0) if lengths is None else lengths.stride()
    _choice[heads, batch](
        scores, lengths, out, pages, count, page, each, *scores.stride()[:2], *strides,
        BLOCK=block, FOURS=fours, KEEP=keep or 0.0, NEWEST=newest,
        num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
    )  # fmt: skip
    return out
