"""Gradients of biases of distances: sums of attention's dS along diagonals.

    dB[h, δ] = Σ_b Σ_{j−i=δ} P_ij (dO_i·V_j − D_i),   P = e^(S − lse),   D = rowsum(dO ∘ O) − dlse

Tiles of BQ queries and BK keys that follow one another along a diagonal hold the same distances at the
same places. So a program walks along such a stripe and adds tile to tile, number by number; their biases,
the same for all, are loaded once. The sums along the diagonals of what it found are left to a second
kernel: they are made once for a stripe, however many tiles it has. No two programs add to one number, so
that the result is the same each time.

Which tiles are visible, and which pairs of those that a mask cuts, is told by lists (see
`attlas.ops.toeplitz_kernels`). A long stripe is several items, each with its own tile of sums.

Cost: 2·2·n²·d multiply-adds a head for two-sided attention, half of that for causal; q, k, v and dO are
read once for every BK or BQ of the others. Nothing of the pairs is written.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["heads", "queries"])
@no_type_check
def _rows(
    out, d_out, lse, d_lse, delta, top, heads, queries, o_b, o_h, o_t, d_b, d_h, d_t,
    dv: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """D of every row, and its lse to base 2: +∞ where it sees nothing, so that its weights are 0."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DV)
    live = t < queries
    inside = live[:, None] & (d < dv)[None, :]
    far, long = batch.to(tl.int64), t.to(tl.int64)
    found = tl.zeros((ROWS,), tl.float32)
    if OUT:
        at = far * o_b + head * o_h + long[:, None] * o_t + d[None, :]
        y = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        at = far * d_b + head * d_h + long[:, None] * d_t + d[None, :]
        found += tl.sum(y * tl.load(d_out + at, mask=inside, other=0.0).to(tl.float32), axis=1)
    at = tl.program_id(1).to(tl.int64) * queries + long
    if LSE:
        found -= tl.load(d_lse + at, mask=live, other=0.0)
    sums = tl.load(lse + at, mask=live, other=0.0)
    tl.store(delta + at, found, mask=live)
    tl.store(top + at, tl.where(sums == float("-inf"), float("inf"), sums * LOG2E), mask=live)


@triton.jit
@no_type_check
def _part(
    x, first, x_t, count, width: tl.constexpr, N: tl.constexpr, W: tl.constexpr, CUT: tl.constexpr
):
    """N rows of x from `first` on; with CUT some may lie behind the last, and are zeros."""
    t, d = tl.arange(0, N), tl.arange(0, W)
    at = x + first.to(tl.int64) * x_t + t[:, None] * x_t + d[None, :]
    if CUT:
        return tl.load(at, mask=(first + t < count)[:, None] & (d < width)[None, :], other=0.0)
    if width != W:
        return tl.load(at, mask=(d < width)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
@no_type_check
def _tile(
    q, k, v, d_out, top, delta, biased, row, column, scale, queries, keys, q_t, k_t, v_t, o_t,
    dk: tl.constexpr, dv: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of the pairs of BQ queries and BK keys."""
    query = _part(q, row, q_t, queries, dk, BQ, DK, CUT)
    key = _part(k, column, k_t, keys, dk, BK, DK, CUT)
    grad = _part(d_out, row, o_t, queries, dv, BQ, DV, CUT)
    value = _part(v, column, v_t, keys, dv, BK, DV, CUT)
    t = row + tl.arange(0, BQ)
    if CUT:
        sums = tl.load(top + t, mask=t < queries, other=float("inf"))
        mean = tl.load(delta + t, mask=t < queries, other=0.0)
    else:
        sums, mean = tl.load(top + t), tl.load(delta + t)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    weights = tl.exp2(scores * scale + biased - sums[:, None])
    return weights * (tl.dot(grad, tl.trans(value), input_precision=PRECISION) - mean[:, None])


@triton.jit(do_not_specialize=[
    "head_0", "heads", "group", "batch", "each", "queries", "keys", "width", "edge", "least",
    "slots", "scale",
])  # fmt: skip
@no_type_check
def _stripes(
    q, k, v, d_out, top, delta, table, rows, cut, seen, items, order, begins, sums,
    head_0, heads, group, batch, each, queries, keys, width, edge, least, slots, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    dk: tl.constexpr, dv: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BQ: tl.constexpr,
    BK: tl.constexpr, BY_BATCH: tl.constexpr, BY_HEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One item of one head, for `each` rows of the batch: the sum of dS over its tiles."""
    head, piece = head_0 + tl.program_id(1), tl.program_id(2)
    pattern = (piece if BY_BATCH else 0) * (heads if BY_HEAD else 1) + (head if BY_HEAD else 0)
    place = tl.load(begins + pattern) + tl.program_id(0)
    if place < tl.load(begins + pattern + 1):
        item = tl.load(order + place)
        stripe, first = tl.load(items + item * 4), tl.load(items + item * 4 + 1)
        half, stop = tl.load(items + item * 4 + 2), tl.load(items + item * 4 + 3)
        apart, r, c = (least + stripe) * BK, tl.arange(0, BQ), tl.arange(0, BK)
        number = edge + stripe * BK + c[None, :] - r[:, None]
        biased = tl.load(
            table + head.to(tl.int64) * width + number, mask=(number >= 0) & (number < width), other=0.0
        ) * LOG2E  # fmt: skip
        up, over = head.to(tl.int64), (head // group).to(tl.int64)
        q += up * q_h
        k += over * k_h
        v += over * v_h
        d_out += up * o_h
        total = tl.zeros((BQ, BK), tl.float32)
        rows_of = tl.minimum(each, batch - piece * each)
        for n in range((half - first) * rows_of):
            far = (piece * each + n // (half - first)).to(tl.int64)
            row = tl.load(rows + first + n % (half - first)) * BQ
            at = (far * heads + head) * queries
            total += _tile(
                q + far * q_b, k + far * k_b, v + far * v_b, d_out + far * o_b, top + at, delta + at,
                biased, row, row + apart, scale, queries, keys, q_t, k_t, v_t, o_t,
                dk, dv, DK, DV, BQ, BK, False, PRECISION,
            )  # fmt: skip
        for n in range((stop - half) * rows_of):
            far = (piece * each + n // (stop - half)).to(tl.int64)
            here = half + n % (stop - half)
            row, at = tl.load(rows + here) * BQ, (far * heads + head) * queries
            found = _tile(
                q + far * q_b, k + far * k_b, v + far * v_b, d_out + far * o_b, top + at, delta + at,
                biased, row, row + apart, scale, queries, keys, q_t, k_t, v_t, o_t,
                dk, dv, DK, DV, BQ, BK, True, PRECISION,
            )  # fmt: skip
            bits = seen + tl.load(cut + here).to(tl.int64) * (BQ * BK) + r[:, None] * BK + c[None, :]
            total += tl.where(tl.load(bits) != 0, found, 0.0)
        slot = (piece.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * slots + tl.program_id(0)
        tl.store(sums + slot * (BQ * BK) + r[:, None] * BK + c[None, :], total)


@triton.jit(do_not_specialize=[
    "head_0", "heads", "pieces", "local", "width", "edge", "slots", "stripes",
])  # fmt: skip
@no_type_check
def _gather(
    sums, items, slot_of, of_stripe, d_table, head_0, heads, pieces, local, width, edge, slots,
    stripes, BQ: tl.constexpr, BK: tl.constexpr, X: tl.constexpr, R: tl.constexpr,
    BY_BATCH: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Sums along the diagonals of X distances, over all items that hold some of them."""
    start, head = tl.program_id(0) * X, head_0 + tl.program_id(1)
    x = start + tl.arange(0, X)
    # A stripe reaches from its first key less the last query to its last key less the first query.
    low, high = start - edge - (BK - 1), start + X - 1 - edge + BQ - 1
    from_stripe = tl.minimum(tl.maximum(low, 0) // BK, stripes)
    to_stripe = tl.minimum(tl.maximum(high + BK, 0) // BK, stripes)
    found = tl.zeros((X,), tl.float32)
    for piece in range(pieces):
        pattern = (piece if BY_BATCH else 0) * (heads if BY_HEAD else 1) + (head if BY_HEAD else 0)
        base = of_stripe + pattern * stripes
        first = (piece * local + tl.program_id(1)).to(tl.int64) * slots
        for item in range(tl.load(base + from_stripe), tl.load(base + to_stripe)):
            slot = first + tl.load(slot_of + item)
            corner = x - edge - tl.load(items + item * 4) * BK
            for r in range(0, BQ, R):
                rows = r + tl.arange(0, R)
                c = corner[None, :] + rows[:, None]
                at = sums + slot * (BQ * BK) + rows[:, None] * BK + c
                found += tl.sum(tl.load(at, mask=(c >= 0) & (c < BK), other=0.0), axis=0)
    tl.store(d_table + head.to(tl.int64) * width + x, found, mask=x < width)
