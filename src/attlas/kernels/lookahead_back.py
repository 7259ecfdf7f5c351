"""Gradients of attention to lookahead keys on a GPU: tiles of keys walk back along the queries.

With U_J and D_J, U's gradient, behind a block of queries I, in the names of `attlas.kernels.lookahead`,
and N = tril(q_I ṽ_Iᵀ), P the weights, S the scores, σ' = σ (1 − σ):

    U_J ← U_J − Σ ṽ_I          dS = P (dO Vᵀ − rowsum(dO ⊙ O))          X = −scale · dS ⊙ silu'(W)
    dV += Pᵀ dO                dK += scale · dSᵀ q_I                    dN = tril(X Σ)
    dq_I = Σ_J scale · dS K_J + X U_J + dN ṽ_I          dṽ_I = Σ_J Σᵀ D_J + dNᵀ q_I
    A = scale · (Xᵀ N + D_J ṽ_Iᵀ) ⊙ σ'          dq̃ += A k̃_I          dk̃_I = Σ_J Aᵀ q̃_J
    D_J ← D_J + Xᵀ q_I

A program walks back twice: once for dq, dK, dV and X, which it stores, once for all else, so that no
more sums are under way than registers hold. What is taken off U once more is not to the bit what was
added: U is given anew at some waves' ends. The sums over tiles J are made of parts, always in one order,
by a second kernel.

Cost: n²/2 · (15d + 4I + 2d·I/J) multiply-adds a head, where plain attention has n²/2 · 5d; 3d + J numbers
written and read for each query and tile.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.lookahead import (
    _LOG2E,
    VARYING,
    near_of,
    put_rows,
    rows_of,
    shares,
    sigmoid,
    spans,
)


@triton.jit
@no_type_check
def _to_scores(
    state, d_key, d_value, key, value, asking, shown, s, q, k_new, v_new, near, d_out, lse, dots, d_q,
    met, seen, begin, first, last, end, window, scale, q_t, k_new_t, v_new_t, d_out_t,
    D: tl.constexpr, ROOM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    LEARNS: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """U_J, dK and dV before the blocks of queries from `first` to `last`; dq and X are stored.

    Squares are [keys, queries], so that what sums over queries reads them where they are.
    """
    n, m = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    blocks = tl.cdiv(tl.maximum(last - first, 0), QUERIES)
    for block in range(blocks):
        at = first + (blocks - 1 - block) * QUERIES
        i = at + n
        live, t = i < end, seen + i
        query = rows_of(q, at, n, q_t, live, D, ROOM)
        above = rows_of(d_out, at, n, d_out_t, live, D, ROOM)
        row_lse = tl.load(lse + i, mask=live, other=float("inf"))
        row_dots = tl.load(dots + i, mask=live, other=0.0)
        dtype = query.dtype
        if LEARNS:
            token = rows_of(k_new, at, n, k_new_t, live, D, ROOM)
            lesson = rows_of(v_new, at, n, v_new_t, live, D, ROOM)
            share = shares(asking, token, s, t, window, scale, MASKED, WINDOW, FAST, PRECISION)
            state -= tl.dot(share, lesson, input_precision=PRECISION)
        low = state.to(dtype)
        w = tl.dot(low, tl.trans(query), input_precision=PRECISION)
        if LEARNS:
            w = tl.dot(share, tl.trans(near_of(near, at, QUERIES)), w, input_precision=PRECISION)
        w *= scale
        gate = sigmoid(w, FAST)
        slope = (gate * (1.0 + w * (1.0 - gate)) * -scale).to(dtype)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
        p = tl.exp2((scores - w * gate) * _LOG2E - row_lse[None, :])
        if MASKED:
            p = tl.where(s[:, None] <= t[None, :], p, 0.0)
        if PADDED:
            p = tl.where(shown[:, None], p, 0.0)
        d_value = tl.dot(p.to(dtype), above, d_value, input_precision=PRECISION)
        grad = tl.dot(value, tl.trans(above), input_precision=PRECISION)
        grad = p * (grad - row_dots[None, :])
        x = (grad * slope).to(dtype)
        grad = (grad * scale).to(dtype)
        place = met + (at - begin) * KEYS + m[:, None] * QUERIES + n[None, :]
        tl.store(place, x)
        d_key = tl.dot(grad, query, d_key, input_precision=PRECISION)
        of_query = tl.dot(tl.trans(grad), key, input_precision=PRECISION)
        of_query = tl.dot(tl.trans(x), low, of_query, input_precision=PRECISION)
        if LEARNS:
            of_near = _of_near(x, share, QUERIES, PRECISION)
            of_query = tl.dot(of_near, lesson, of_query, input_precision=PRECISION)
        put_rows(d_q, at - begin, n, D, live, of_query, D, ROOM)
    return state, d_key, d_value


@triton.jit
@no_type_check
def _of_near(x, share, QUERIES: tl.constexpr, PRECISION: tl.constexpr):
    """What a tile adds to the gradient of tril(q_I ṽ_Iᵀ)."""
    n = tl.arange(0, QUERIES)
    found = tl.dot(tl.trans(x), share, input_precision=PRECISION)
    return tl.where(n[:, None] >= n[None, :], found, 0.0).to(x.dtype)


@triton.jit
@no_type_check
def _to_lessons(
    d_state, d_asking, asking, s, q, k_new, v_new, near, d_k_new, d_v_new, met,
    seen, begin, first, last, end, window, scale, q_t, k_new_t, v_new_t,
    D: tl.constexpr, ROOM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    LEARNS: tl.constexpr, WINDOW: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D_J and dq̃ before the blocks of queries from `first` to `last`; dk̃ and dṽ are stored."""
    n, m = tl.arange(0, QUERIES), tl.arange(0, KEYS)
    blocks = tl.cdiv(tl.maximum(last - first, 0), QUERIES)
    for block in range(blocks):
        at = first + (blocks - 1 - block) * QUERIES
        i = at + n
        live, t = i < end, seen + i
        query = rows_of(q, at, n, q_t, live, D, ROOM)
        x = tl.load(met + (at - begin) * KEYS + m[:, None] * QUERIES + n[None, :])
        if LEARNS:
            token = rows_of(k_new, at, n, k_new_t, live, D, ROOM)
            lesson = rows_of(v_new, at, n, v_new_t, live, D, ROOM)
            share = shares(asking, token, s, t, window, scale, MASKED, WINDOW, FAST, PRECISION)
            after = d_state.to(x.dtype)
            of_lesson = tl.dot(tl.trans(share), after, input_precision=PRECISION)
            of_near = _of_near(x, share, QUERIES, PRECISION)
            of_lesson = tl.dot(tl.trans(of_near), query, of_lesson, input_precision=PRECISION)
            put_rows(d_v_new, at - begin, n, D, live, of_lesson, D, ROOM)
            of_share = tl.dot(after, tl.trans(lesson), input_precision=PRECISION)
            of_share = tl.dot(x, near_of(near, at, QUERIES), of_share, input_precision=PRECISION)
            # Where nothing is learned σ stands as 0, and so does its gradient.
            asked = share.to(tl.float32)
            asked = (of_share * (asked * (1.0 - asked) * scale)).to(x.dtype)
            d_asking = tl.dot(asked, token, d_asking, input_precision=PRECISION)
            of_token = tl.dot(tl.trans(asked), asking, input_precision=PRECISION)
            put_rows(d_k_new, at - begin, n, D, live, of_token, D, ROOM)
        else:
            nothing = tl.zeros((QUERIES, ROOM), tl.float32)
            put_rows(d_v_new, at - begin, n, D, live, nothing, D, ROOM)
            put_rows(d_k_new, at - begin, n, D, live, nothing, D, ROOM)
        d_state = tl.dot(x, query, d_state, input_precision=PRECISION)
    return d_state, d_asking


@triton.jit(do_not_specialize=VARYING)
@no_type_check
def backward(
    q, k, v, asking, k_new, v_new, u, u_before, valid, near, d_out, lse, dots, sums, parts, met,
    heads, group, keys, queries, seen, begin, end, window, scale, rows,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, asking_b, asking_h, asking_t,
    k_new_b, k_new_h, k_new_t, v_new_b, v_new_h, v_new_t, valid_b, d_out_b, d_out_h, d_out_t,
    D: tl.constexpr, ROOM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    PADDED: tl.constexpr, FAST: tl.constexpr, ONCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys meets a wave of queries from its `end` to its `begin`.

    u: of the `seen` + `end` keys behind the wave; u_before: of those before it, written. sums: [4,
    batch · heads, keys, D], D, dK, dV and dq̃ so far. parts: [3, batch · heads, tiles, rows, D], of dq,
    dk̃ and dṽ, written where a row may see a key of the tile. met: room for X, [batch · heads, tiles,
    rows, KEYS].
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    up = head // group
    place = batch * (heads // group) + up
    m = tl.arange(0, KEYS)
    s = tile * KEYS + m
    there = s < keys
    key = rows_of(k + batch * k_b + up * k_h, tile * KEYS, m, k_t, there, D, ROOM)
    value = rows_of(v + batch * v_b + up * v_h, tile * KEYS, m, v_t, there, D, ROOM)
    asks = rows_of(asking + batch * asking_b + up * asking_h, tile * KEYS, m, asking_t, there, D, ROOM)
    shown = there
    if PADDED:
        shown = tl.load(valid + batch * valid_b + s, mask=there, other=0) != 0
    known = seen + end
    state = rows_of(u + place * known * D, tile * KEYS, m, D, s < known, D, ROOM)
    each = tl.num_programs(1).to(tl.int64) * keys * D
    sums += row * keys * D
    q += batch * q_b + head * q_h
    k_new += batch * k_new_b + up * k_new_h
    v_new += batch * v_new_b + up * v_new_h
    near += row * tl.cdiv(queries, QUERIES) * QUERIES * QUERIES
    d_out += batch * d_out_b + head * d_out_h
    lse += row * queries
    dots += row * queries
    part = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * rows * D
    slot = (row * tl.num_programs(0) + tile) * rows
    parts += slot * D
    met += slot * KEYS
    first, turn = spans(tile * KEYS, seen, begin, end, window, QUERIES, KEYS, WINDOW, ONCE)
    d_key = rows_of(sums + each, tile * KEYS, m, D, there, D, ROOM)
    d_value = rows_of(sums + 2 * each, tile * KEYS, m, D, there, D, ROOM)
    if not ONCE:
        state, d_key, d_value = _to_scores(
            state, d_key, d_value, key, value, asks, shown, s, q, k_new, v_new, near, d_out, lse, dots,
            parts, met, seen, begin, turn, end, end, window, scale, q_t, k_new_t, v_new_t, d_out_t,
            D, ROOM, QUERIES, KEYS, False, not WINDOW, WINDOW, PADDED, FAST, PRECISION,
        )  # fmt: skip
    state, d_key, d_value = _to_scores(
        state, d_key, d_value, key, value, asks, shown, s, q, k_new, v_new, near, d_out, lse, dots,
        parts, met, seen, begin, first, tl.minimum(turn, end), end, window, scale, q_t, k_new_t, v_new_t,
        d_out_t, D, ROOM, QUERIES, KEYS, True, True, WINDOW, PADDED, FAST, PRECISION,
    )  # fmt: skip
    put_rows(sums + each, tile * KEYS, m, D, there, d_key, D, ROOM)
    put_rows(sums + 2 * each, tile * KEYS, m, D, there, d_value, D, ROOM)
    if head % group == 0:
        known = seen + begin
        put_rows(u_before + place * known * D, tile * KEYS, m, D, s < known, state, D, ROOM)
    tl.debug_barrier()  # X is read by other threads than those that stored it
    d_state = rows_of(sums, tile * KEYS, m, D, there, D, ROOM)
    d_asking = rows_of(sums + 3 * each, tile * KEYS, m, D, there, D, ROOM)
    if not ONCE:
        d_state, d_asking = _to_lessons(
            d_state, d_asking, asks, s, q, k_new, v_new, near, parts + part, parts + 2 * part, met,
            seen, begin, turn, end, end, window, scale, q_t, k_new_t, v_new_t,
            D, ROOM, QUERIES, KEYS, False, not WINDOW, WINDOW, FAST, PRECISION,
        )  # fmt: skip
    d_state, d_asking = _to_lessons(
        d_state, d_asking, asks, s, q, k_new, v_new, near, parts + part, parts + 2 * part, met,
        seen, begin, first, tl.minimum(turn, end), end, window, scale, q_t, k_new_t, v_new_t,
        D, ROOM, QUERIES, KEYS, True, True, WINDOW, FAST, PRECISION,
    )  # fmt: skip
    put_rows(sums, tile * KEYS, m, D, there, d_state, D, ROOM)
    put_rows(sums + 3 * each, tile * KEYS, m, D, there, d_asking, D, ROOM)


@triton.jit(do_not_specialize=VARYING)
@no_type_check
def summed(
    parts, d_q, d_k_new, d_v_new, heads, group, tiles, seen, begin, end, rows,
    q_b, q_h, q_t, new_b, new_h, new_t,
    D: tl.constexpr, ROOM: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of some queries of a wave, or of their k̃ or ṽ, from those of all tiles."""
    row, kind = tl.program_id(1).to(tl.int64), tl.program_id(2)
    batch, head = row // heads, row % heads
    if (kind > 0) & (head % group > 0):
        return
    at, n = tl.program_id(0) * ROWS, tl.arange(0, ROWS)
    i = begin + at + n
    live = i < end
    found = tl.zeros([ROWS, ROOM], tl.float32)
    last = seen + tl.minimum(begin + at + ROWS, end) - 1
    parts += (kind * tl.num_programs(1).to(tl.int64) + row) * tiles * rows * D
    for _ in range(tl.where(kind > 0, group, 1)):
        for tile in range(last // KEYS + 1):
            met = live & (tile * KEYS <= seen + i)
            found += rows_of(parts, tile * rows + at, n, D, met, D, ROOM).to(tl.float32)
        parts += tl.cast(tiles, tl.int64) * rows * D
    new = batch * new_b + head // group * new_h
    if kind == 0:
        put_rows(d_q + batch * q_b + head * q_h, begin + at, n, q_t, live, found, D, ROOM)
    elif kind == 1:
        put_rows(d_k_new + new, begin + at, n, new_t, live, found, D, ROOM)
    else:
        put_rows(d_v_new + new, begin + at, n, new_t, live, found, D, ROOM)
