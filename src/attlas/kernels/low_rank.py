"""Recurrences with a low-rank update on a GPU, as RWKV-7 has it; each channel with its own decay.

    u_t = S_{t−1}ᵀ b_t      S_t = diag(e^{g_t}) S_{t−1} + a_t u_tᵀ + k_t v_tᵀ      o_t = scale · S_tᵀ q_t

Within a chunk, with G the sums of g and ⟨x, y⟩_ts = Σ_d x_td y_sd e^{…G_td − G_sd}, strictly below the
diagonal for b and with it for q,

    T = (I − ⟨b, a⟩)⁻¹      M = T ⟨b, k⟩        U = M V + T (b e^{G−g}) S_0
    O = ⟨q, k⟩ V + ⟨q, a⟩ U + (q e^G) S_0

and backwards, with D the gradient of S and X that of U,

    R = ⟨q, a⟩ᵀ dO + (a e^{G_C − G}) D_C        X = Tᵀ R
    dV = ⟨q, k⟩ᵀ dO + Mᵀ R + (k e^{G_C − G}) D_C
    D_0 = e^{G_C} D_C + (q e^G)ᵀ dO + (b e^{G−g})ᵀ X

The four squares of all chunks are found at once, and with them q, b, k and a with their decays from and
to the middle of the chunk, so that the sweeps from chunk to chunk are products alone. As in
`attlas.kernels.sweep`, no decay is below 2^−12 a token.

Cost: n·(4c + 4d)·d multiply-adds a head for chunks of c tokens, and 4·n·c·d for the squares; 4·n·(c + d)
numbers a head of half precision in between.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.delta import _halves, _tile
from attlas.kernels.sweep import _channel_decays


@triton.jit
@no_type_check
def _side(tiles, which, row, t, live, c, c_in, width: tl.constexpr):
    """One of four tiles that stand side by side for every token."""
    place = ((row + t[:, None]) * 4 + which) * width + c[None, :]
    return tl.load(tiles + place, mask=live[:, None] & c_in[None, :], other=0.0)


@triton.jit(do_not_specialize=["heads", "tokens", "chunks", "scale"])
@no_type_check
def _squares(
    q, k, a, b, g, near, squares, marks, offsets, heads, tokens, chunks, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, a_b, a_h, a_t, b_b, b_h, b_t, g_b, g_h, g_t,
    dk: tl.constexpr, C: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """Of one chunk: q, b, k and a, decayed from or to its middle; ⟨q, k⟩, ⟨q, a⟩, T and M; and what a
    state keeps up to the middle, and from there on."""
    sequence = tl.program_id(1)
    begin, stop = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    start = begin + tl.program_id(0) * C
    if start >= stop:
        return
    far, up = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    i, d = tl.arange(0, C), tl.arange(0, DK)
    t, live, d_in = (start + i).to(tl.int64), start + i < stop, d < dk
    each, whole, chunk, middle = _channel_decays(g + far * g_b + up * g_h, t, live, d, d_in, g_t, C)
    query = _tile(q, far * q_b + up * q_h, t, q_t, live, d, d_in)
    key = _tile(k, far * k_b + up * k_h, t, k_t, live, d, d_in)
    left = _tile(a, far * a_b + up * a_h, t, a_t, live, d, d_in)
    right = _tile(b, far * b_b + up * b_h, t, b_t, live, d, d_in)
    dtype = query.dtype
    after = whole - middle[None, :]
    query = (query * tl.exp2(after) * scale).to(dtype)
    right = (right * tl.exp2(after - each)).to(dtype)  # which reads before its token's own decay
    key = (key * tl.exp2(-after)).to(dtype)
    left = (left * tl.exp2(-after)).to(dtype)
    row = (far * heads + up) * tokens
    shown = live[:, None] & d_in[None, :]
    place = near + (row + t[:, None]) * 4 * dk + d[None, :]
    tl.store(place, query, mask=shown)
    tl.store(place + dk, right, mask=shown)
    tl.store(place + 2 * dk, key, mask=shown)
    tl.store(place + 3 * dk, left, mask=shown)
    number = tl.load(offsets + tl.num_programs(1) + 1 + sequence) + tl.program_id(0)
    mark = marks + ((far * heads + up) * chunks + number) * 2 * dk + d
    tl.store(mark, tl.exp2(middle), mask=d_in)
    tl.store(mark + dk, tl.exp2(chunk - middle), mask=d_in)
    seen, earlier = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    pairs = tl.where(seen, tl.dot(query, tl.trans(key)), 0.0)
    pairs_left = tl.where(seen, tl.dot(query, tl.trans(left)), 0.0)
    lower = tl.where(earlier, tl.dot(right, tl.trans(left)), 0.0)
    known = tl.where(earlier, tl.dot(right, tl.trans(key)), 0.0)
    # As in the delta rule's, from the inverses of halves; here of I − lower.
    solved = (i[:, None] == i[None, :]).to(tl.float32) + tl.where(_halves(i, 1), lower, 0.0)
    for level in tl.static_range(1, 4):
        between = tl.where(_halves(i, 2**level), lower, 0.0)
        part = tl.dot(solved, between, input_precision="tf32")
        solved += tl.dot(part, solved, input_precision="tf32")
    known = tl.dot(solved, known, input_precision="tf32")
    cell = squares + (row + t[:, None]) * 4 * C + i[None, :]
    tl.store(cell, pairs.to(dtype), mask=live[:, None])
    tl.store(cell + C, pairs_left.to(dtype), mask=live[:, None])
    tl.store(cell + 2 * C, solved.to(dtype), mask=live[:, None])
    tl.store(cell + 3 * C, known.to(dtype), mask=live[:, None])


@triton.jit(do_not_specialize=["heads", "tokens", "chunks"])
@no_type_check
def _onwards(
    v, near, squares, marks, written, out, start_state, end_state, offsets, heads, tokens, chunks,
    v_b, v_h, v_t, o_b, o_h, o_t,
    dk: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, dv: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, START: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    """One sequence of one head forwards, for BV columns of v."""
    column, sequence = tl.program_id(0), tl.program_id(1)
    far, up = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    begin, stop = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    d, e, i = tl.arange(0, DK), column * BV + tl.arange(0, BV), tl.arange(0, C)
    d_in, e_in, all_in = d < dk, e < dv, i < C
    cell = ((sequence if PACKED else far) * heads + up) * dk * dv
    cell += d[:, None].to(tl.int64) * dv + e[None, :]
    inside = d_in[:, None] & e_in[None, :]
    state = tl.zeros((DK, BV), tl.float32)
    if START:
        state += tl.load(start_state + cell, mask=inside, other=0.0)
    row = (far * heads + up) * tokens
    first = tl.load(offsets + tl.num_programs(1) + 1 + sequence)
    mark = marks + ((far * heads + up) * chunks + first) * 2 * dk + d
    for n in range(tl.cdiv(stop - begin, C)):
        at = begin + n * C
        t, live = (at + i).to(tl.int64), at + i < stop
        query = _side(near, 0, row, t, live, d, d_in, dk)
        right = _side(near, 1, row, t, live, d, d_in, dk)
        key = _side(near, 2, row, t, live, d, d_in, dk)
        left = _side(near, 3, row, t, live, d, d_in, dk)
        pairs = _side(squares, 0, row, t, live, i, all_in, C)
        pairs_left = _side(squares, 1, row, t, live, i, all_in, C)
        solved = _side(squares, 2, row, t, live, i, all_in, C)
        known = _side(squares, 3, row, t, live, i, all_in, C)
        value = _tile(v, far * v_b + up * v_h, t, v_t, live, e, e_in)
        dtype = value.dtype
        state *= tl.load(mark + n * 2 * dk, mask=d_in, other=0.0)[:, None]
        low = state.to(dtype)
        read = tl.dot(right, low).to(dtype)
        new = tl.dot(solved, read, tl.dot(known, value)).to(dtype)
        y = tl.dot(pairs_left, new, tl.dot(pairs, value, tl.dot(query, low)))
        shown = live[:, None] & e_in[None, :]
        o_at = far * o_b + up * o_h + t[:, None] * o_t + e[None, :]
        tl.store(out + o_at, y.to(out.dtype.element_ty), mask=shown)
        if WRITTEN:
            tl.store(written + o_at, new, mask=shown)
        state = tl.dot(tl.trans(left), new, tl.dot(tl.trans(key), value, state))
        state *= tl.load(mark + (n * 2 + 1) * dk, mask=d_in, other=0.0)[:, None]
    tl.store(end_state + cell, state, mask=inside)


@triton.jit(do_not_specialize=["heads", "tokens", "chunks"])
@no_type_check
def _back(
    near, squares, marks, d_out, x, d_v, end_grad, start_grad, offsets, heads, tokens, chunks,
    o_b, o_h, o_t, x_b, x_h, x_t,
    dk: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, dv: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, END: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """One sequence of one head backwards, for BV columns of v: X and dV."""
    column, sequence = tl.program_id(0), tl.program_id(1)
    far, up = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    begin, stop = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    d, e, i = tl.arange(0, DK), column * BV + tl.arange(0, BV), tl.arange(0, C)
    d_in, e_in, all_in = d < dk, e < dv, i < C
    cell = ((sequence if PACKED else far) * heads + up) * dk * dv
    cell += d[:, None].to(tl.int64) * dv + e[None, :]
    inside = d_in[:, None] & e_in[None, :]
    grad = tl.zeros((DK, BV), tl.float32)
    if END:
        grad += tl.load(end_grad + cell, mask=inside, other=0.0)
    row = (far * heads + up) * tokens
    first = tl.load(offsets + tl.num_programs(1) + 1 + sequence)
    mark = marks + ((far * heads + up) * chunks + first) * 2 * dk + d
    count = tl.cdiv(stop - begin, C)
    for m in range(count):
        n = count - 1 - m
        at = begin + n * C
        t, live = (at + i).to(tl.int64), at + i < stop
        query = _side(near, 0, row, t, live, d, d_in, dk)
        right = _side(near, 1, row, t, live, d, d_in, dk)
        key = _side(near, 2, row, t, live, d, d_in, dk)
        left = _side(near, 3, row, t, live, d, d_in, dk)
        pairs = _side(squares, 0, row, t, live, i, all_in, C)
        pairs_left = _side(squares, 1, row, t, live, i, all_in, C)
        solved = _side(squares, 2, row, t, live, i, all_in, C)
        known = _side(squares, 3, row, t, live, i, all_in, C)
        above = _tile(d_out, far * o_b + up * o_h, t, o_t, live, e, e_in)
        dtype = above.dtype
        grad *= tl.load(mark + (n * 2 + 1) * dk, mask=d_in, other=0.0)[:, None]
        low = grad.to(dtype)
        reached = tl.dot(tl.trans(pairs_left), above, tl.dot(left, low)).to(dtype)
        each = tl.dot(tl.trans(solved), reached).to(dtype)
        of_value = tl.dot(tl.trans(pairs), above, tl.dot(key, low))
        of_value = tl.dot(tl.trans(known), reached, of_value)
        shown = live[:, None] & e_in[None, :]
        x_at = far * x_b + up * x_h + t[:, None] * x_t + e[None, :]
        tl.store(x + x_at, each, mask=shown)
        tl.store(d_v + x_at, of_value.to(d_v.dtype.element_ty), mask=shown)
        grad = tl.dot(tl.trans(right), each, tl.dot(tl.trans(query), above, grad))
        grad *= tl.load(mark + n * 2 * dk, mask=d_in, other=0.0)[:, None]
    if START:
        tl.store(start_grad + cell, grad, mask=inside)
