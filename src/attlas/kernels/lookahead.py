"""Attention to lookahead keys on a GPU, forwards: tiles of keys walk along the queries.

    σ_sj = sigmoid(scale · q̃_s·k̃_j)          for s < j, and j ≤ s + window where there is one
    w_ts = scale · q_t·u_s^t                  u_s^t = Σ_{j ≤ t} σ_sj ṽ_j
    out  = softmax(scale · q_t·k_s − w_ts sigmoid(w_ts)) V

A program owns a tile of keys J of one head, holds their U_J in registers, and takes one block of queries
I after the other, of which each is one look and one lesson:

    W = q_I U_Jᵀ + tril(q_I ṽ_Iᵀ) Σᵀ          U_J ← U_J + Σ ṽ_I

So U never meets memory between blocks, and σ is found once. What a tile contributes to a block is a mean
of its values and a log₂-sum-exp₂, which a second kernel merges over the tiles, always in one order. Since
these parts are as many as there are pairs of a query and a tile, a launch takes a stretch of queries, a
*wave*; U goes from wave to wave in float32.

Cost: n²/2 · (5d + 3I/2) multiply-adds a head for blocks of I = J/2 queries, where plain attention has
n²/2 · 2d; d numbers written and read for each query and tile.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

_LOG2E = tl.constexpr(1.4426950408889634)
#: What changes from call to call or from wave to wave, for which nothing is compiled anew.
VARYING = ["heads", "group", "keys", "queries", "seen", "begin", "end", "window", "scale", "rows", "tiles"]


@triton.jit
@no_type_check
def rows_of(x, t, step, live, D: tl.constexpr, ROOM: tl.constexpr):
    """Rows t of a head; zeros where there are none."""
    d = tl.arange(0, ROOM)
    mask = live[:, None]
    if D < ROOM:
        mask = mask & (d < D)[None, :]
    return tl.load(x + t.to(tl.int64)[:, None] * step + d[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def put_rows(x, t, step, live, value, D: tl.constexpr, ROOM: tl.constexpr):
    """Store rows t of a head."""
    d = tl.arange(0, ROOM)
    mask = live[:, None]
    if D < ROOM:
        mask = mask & (d < D)[None, :]
    place = x + t.to(tl.int64)[:, None] * step + d[None, :]
    tl.store(place, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def sigmoid(x, FAST: tl.constexpr):
    """σ(x); FAST by one instruction, exact to 2^−12."""
    if FAST:
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1
        )
        return half * 0.5 + 0.5
    return 1.0 / (1.0 + tl.exp2(x * -_LOG2E))


@triton.jit
@no_type_check
def shares(
    asking, k_new, s, t, window, scale,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ of keys s against tokens t, [keys, tokens], as an operand."""
    share = tl.dot(asking, tl.trans(k_new), input_precision=PRECISION) * scale
    share = sigmoid(share, FAST)
    if MASKED:
        after = t[None, :] - s[:, None]
        learns = after > 0
        if WINDOW:
            learns = learns & (after <= window)
        share = tl.where(learns, share, 0.0)
    return share.to(asking.dtype)


@triton.jit
@no_type_check
def spans(start, seen, begin, end, window, I: tl.constexpr, J: tl.constexpr, WINDOW: tl.constexpr):
    """(First query that meets the tile of keys at `start`, first query of the plain blocks).

    In plain blocks every query stands behind every key of the tile, which learns from all of them, or
    with a window from none.
    """
    first = begin + tl.maximum(start - seen - begin, 0) // I * I
    behind = start + J - seen - begin
    if WINDOW:
        behind += window
    return first, begin + tl.cdiv(tl.maximum(behind, 0), I) * I


@triton.jit
@no_type_check
def _onwards(
    state, key, value, asking, shown, s, q, k_new, v_new, parts, lses, seen, begin, first, last, end,
    window, scale, q_t, k_new_t, v_new_t,
    D: tl.constexpr, ROOM: tl.constexpr, I: tl.constexpr, J: tl.constexpr, MASKED: tl.constexpr,
    LEARNS: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U_J behind the blocks of queries from `first` to `last`, whose parts are stored."""
    n = tl.arange(0, I)
    for at in range(first, last, I):
        i = at + n
        live, t = i < end, seen + i
        query = rows_of(q, i, q_t, live, D, ROOM)
        w = tl.dot(query, tl.trans(state.to(query.dtype)), input_precision=PRECISION)
        if LEARNS:
            token = rows_of(k_new, i, k_new_t, live, D, ROOM)
            lesson = rows_of(v_new, i, v_new_t, live, D, ROOM)
            share = shares(asking, token, s, t, window, scale, MASKED, WINDOW, FAST, PRECISION)
            near = tl.dot(query, tl.trans(lesson), input_precision=PRECISION)
            near = tl.where(n[:, None] >= n[None, :], near, 0.0).to(query.dtype)
            w = tl.dot(near, tl.trans(share), w, input_precision=PRECISION)
            state = tl.dot(share, lesson, state, input_precision=PRECISION)
        w *= scale
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        scores = (scores - w * sigmoid(w, FAST)) * _LOG2E
        if MASKED:
            scores = tl.where(s[None, :] <= t[:, None], scores, float("-inf"))
        if PADDED:
            scores = tl.where(shown[None, :], scores, float("-inf"))
        top = tl.max(scores, 1)
        # A row that sees nothing here: subtracting 0 avoids −∞ − (−∞).
        p = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(p, 1)
        mean = tl.dot(p.to(value.dtype), value, input_precision=PRECISION)
        mean = mean / tl.where(total == 0.0, 1.0, total)[:, None]
        put_rows(parts, i - begin, D, live, mean, D, ROOM)
        tl.store(lses + (i - begin), top + tl.log2(total), mask=live)
    return state


@triton.jit(do_not_specialize=VARYING)
@no_type_check
def forward(
    q, k, v, asking, k_new, v_new, u, u_next, valid, parts, lses,
    heads, group, keys, seen, begin, end, window, scale, rows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, asking_b, asking_h, asking_t,
    k_new_b, k_new_h, k_new_t, v_new_b, v_new_h, v_new_t, valid_b,
    D: tl.constexpr, ROOM: tl.constexpr, I: tl.constexpr, J: tl.constexpr, WINDOW: tl.constexpr,
    PADDED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys meets a wave of queries, those from `begin` to `end`.

    u: of the `seen` + `begin` keys before the wave; u_next: of all behind it. parts, lses: [batch ·
    heads, tiles, rows], written where a row may see a key of the tile.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    up = head // group
    place = batch * (heads // group) + up
    s = tile * J + tl.arange(0, J)
    there = s < keys
    key = rows_of(k + batch * k_b + up * k_h, s, k_t, there, D, ROOM)
    value = rows_of(v + batch * v_b + up * v_h, s, v_t, there, D, ROOM)
    asks = rows_of(asking + batch * asking_b + up * asking_h, s, asking_t, there, D, ROOM)
    shown = there
    if PADDED:
        shown = tl.load(valid + batch * valid_b + s, mask=there, other=0) != 0
    known = seen + begin
    state = rows_of(u + place * known * D, s, D, s < known, D, ROOM)
    q += batch * q_b + head * q_h
    k_new += batch * k_new_b + up * k_new_h
    v_new += batch * v_new_b + up * v_new_h
    slot = (row * tl.num_programs(0) + tile) * rows
    parts += slot * D
    lses += slot
    first, turn = spans(tile * J, seen, begin, end, window, I, J, WINDOW)
    state = _onwards(
        state, key, value, asks, shown, s, q, k_new, v_new, parts, lses, seen, begin, first,
        tl.minimum(turn, end), end, window, scale, q_t, k_new_t, v_new_t,
        D, ROOM, I, J, True, True, WINDOW, PADDED, FAST, PRECISION,
    )  # fmt: skip
    state = _onwards(
        state, key, value, asks, shown, s, q, k_new, v_new, parts, lses, seen, begin, turn,
        end, end, window, scale, q_t, k_new_t, v_new_t,
        D, ROOM, I, J, False, not WINDOW, WINDOW, PADDED, FAST, PRECISION,
    )  # fmt: skip
    if head % group == 0:
        known = seen + end
        put_rows(u_next + place * known * D, s, D, s < known, state, D, ROOM)


@triton.jit(do_not_specialize=VARYING)
@no_type_check
def merged(
    parts, lses, out, lse, heads, tiles, seen, begin, end, queries, rows, o_b, o_h, o_t,
    D: tl.constexpr, ROOM: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What some queries of a wave get of all tiles, and their log₂-sum-exp₂: +∞ where nothing is seen."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = begin + n
    live = i < end
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, ROOM], tl.float32)
    last = seen + tl.minimum(begin + tl.program_id(0) * ROWS + ROWS, end) - 1
    for tile in range(last // J + 1):
        met = live & (tile * J <= seen + i)
        slot = (row * tiles + tile) * rows
        each = tl.load(lses + slot + n, mask=met, other=float("-inf"))
        mean = rows_of(parts + slot * D, n, D, met, D, ROOM).to(tl.float32)
        higher = tl.maximum(top, each)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, share = tl.exp2(top - base), tl.exp2(each - base)
        total = total * shrink + share
        summed = summed * shrink[:, None] + mean * share[:, None]
        top = higher
    mean = summed / tl.where(total == 0.0, 1.0, total)[:, None]
    put_rows(out + row // heads * o_b + row % heads * o_h, i, o_t, live, mean, D, ROOM)
    found = tl.where(total == 0.0, float("inf"), top + tl.log2(total))
    tl.store(lse + row * queries + i, found, mask=live)
