"""What a query can gain from each page of keys, and the best pages, without a sort.

    bound  = Σ_d max(q_d · low_d, q_d · high_d) = q⁺ · high + q⁻ · low        the group's largest
    chosen = the `count` highest: those above the count-th, and the first of those equal to it

Scores: a program reads a run of summaries once for all heads of the group. Choice: a program keeps a
row's scores as integers of the same order and halves their range until `count` lie above; a running
count of those chosen is then the place where a page's number is written, so that they come ascending.

Cost: 2 · dim numbers read and one float32 written a page; then at most 32 passes over a row's scores
in registers.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import room, units

#: Pages of a block, and programs on each multiprocessor.
PAGES, PROGRAMS = 64, 4


@triton.jit(do_not_specialize=["heads", "pages", "run", "low_b", "low_h", "high_b", "high_h"])
@no_type_check
def _bounds(
    q, low, high, out, heads, pages, run, q_b, q_h, low_b, low_h, low_n, high_b, high_h, high_n,
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
            at = out + (batch * kv_heads + kv_head) * pages + far
            tl.store(at, best, mask=page < pages)
        else:
            at = out + ((batch * heads + head) * pages)[:, None] + far[None, :]
            tl.store(at, bound, mask=valid[:, None] & (page < pages)[None, :])


@triton.jit(do_not_specialize=["pages", "count"])
@no_type_check
def _choice(scores, out, there, wanted, pages, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers of the `count` highest of one row, ascending; of the first `there`, as many as `wanted`."""
    row = tl.program_id(0).to(tl.int64)
    page = tl.arange(0, BLOCK)
    scores += row * pages
    out += row * count
    if there is not None:
        place = tl.arange(0, WIDTH)
        last = count
        pages = tl.minimum(pages, tl.load(there + row).to(tl.int32))
        count = tl.minimum(tl.minimum(last, tl.load(wanted + row).to(tl.int32)), pages)
        tl.store(out + place, -1, mask=(place >= count) & (place < last))
    score = tl.load(scores + page, mask=page < pages, other=float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)  # −0 is no less than 0
    bits = score.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # What is no page lies below every number, −∞ too.
    order = tl.where(page < pages, order, -2147483648)
    # The largest bar that at least `count` reach; once just `count` do, any higher one changes nothing.
    least = tl.min(order, 0).to(tl.int64)
    most = tl.max(order, 0).to(tl.int64)
    while least < most:
        bar = (least + most + 1) >> 1
        reached = tl.sum((order >= bar.to(tl.int32)).to(tl.int32), 0)
        most = tl.where(reached > count, most, tl.where(reached == count, bar, bar - 1))
        least = tl.where(reached >= count, bar, least)
    bar = least.to(tl.int32)
    higher, equal = order > bar, order == bar
    # Both counts in one number: at most 2¹⁴ each.
    steps = tl.cumsum(higher.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    spare = count - tl.sum(higher.to(tl.int32), 0)
    above, level = steps & 0xFFFF, steps >> 16
    chosen = higher | (equal & (level <= spare))
    chosen = chosen & (page < pages)
    at = out + above + tl.minimum(level, spare) - 1
    tl.store(at, tl.where(score > float("-inf"), page, -1), mask=chosen)


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
    out = q.new_empty((batch, kv_heads if shared else heads, pages), dtype=torch.float32)
    blocks = triton.cdiv(pages, PAGES)
    wanted = max(1, units(q.device) * PROGRAMS // (batch * kv_heads))
    run = triton.cdiv(blocks, min(wanted, max(1, blocks))) * PAGES
    _bounds[kv_heads, max(1, triton.cdiv(pages, max(1, run))), batch](
        q, low, high, out, heads, pages, run, *q.stride()[:2], *low.stride()[:3],
        *high.stride()[:3], DIM=dim, DIM_ROOM=room(dim),
        ROWS=room(heads // kv_heads), PAGES=PAGES, SHARED=shared, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


def choose(
    scores: Tensor, count: int, there: Tensor | None = None, wanted: Tensor | None = None
) -> Tensor:
    """Numbers of the `count` highest of each row, ascending, int32; −1 where the score is −∞.

    Args:
        scores: of all pages, [batch, heads, pages].
        count: how many at most.
        there: of how many of the first pages, [batch, heads] on the device; all unless given.
        wanted: how many, likewise; −1 stands behind them.
    """
    scores = scores.contiguous()
    batch, heads, pages = scores.shape
    out = scores.new_empty((batch, heads, count), dtype=torch.int32)
    block = triton.next_power_of_2(pages)
    if count:
        warps = 4 if block <= 1024 else 8 if block <= 4096 else 16
        some = [t if t is None else t.contiguous() for t in (there, wanted)]
        width = 1 if there is None else triton.next_power_of_2(count)
        _choice[batch * heads,](
            scores, out, *some, pages, count, BLOCK=block, WIDTH=width, num_warps=warps
        )  # fmt: skip
    return out
