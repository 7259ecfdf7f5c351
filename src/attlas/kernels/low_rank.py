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

The four squares of all chunks are found at once, then a sweep goes from chunk to chunk. As in
`attlas.kernels.sweep`, decays are taken up to the middle of a chunk, and none is below 2^−12 a token.

Cost: n·(4c + 4d)·d multiply-adds a head for chunks of c tokens, and 4·n·c·d for the squares.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.delta import _halves, _tile
from attlas.kernels.sweep import _CHANNEL, _LOG2E, _channel_decays


@triton.jit
@no_type_check
def _fades(g, at, t, live, c, c_in, g_t, C: tl.constexpr, DK: tl.constexpr, DECAY: tl.constexpr):
    """Log₂ decays up to and with each token, up to it, of the whole chunk, and up to its middle."""
    if DECAY:
        whole, chunk, middle = _channel_decays(g + at, t, live, c, c_in, g_t, C)
        # What comes before a token is the sum with the one before it.
        own = tl.load(
            g + at + t[:, None] * g_t + c[None, :], mask=live[:, None] & c_in[None, :], other=0.0
        )
        return whole, whole - tl.maximum(own.to(tl.float32) * _LOG2E, _CHANNEL), chunk, middle
    none = tl.zeros((C, DK), tl.float32)
    return none, none, tl.zeros((DK,), tl.float32), tl.zeros((DK,), tl.float32)


@triton.jit(do_not_specialize=["heads", "tokens", "scale"])
@no_type_check
def _squares(
    q, k, a, b, g, squares, offsets, heads, tokens, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, a_b, a_h, a_t, b_b, b_h, b_t, g_b, g_h, g_t,
    dk: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """⟨q, k⟩, ⟨q, a⟩, T and M of one chunk, side by side."""
    begin, stop = tl.load(offsets + tl.program_id(1)), tl.load(offsets + tl.program_id(1) + 1)
    start = begin + tl.program_id(0) * C
    if start >= stop:
        return
    far, up = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    i, d = tl.arange(0, C), tl.arange(0, DK)
    t, live, d_in = (start + i).to(tl.int64), start + i < stop, d < dk
    whole, before, _, middle = _fades(g, far * g_b + up * g_h, t, live, d, d_in, g_t, C, DK, DECAY)
    query = _tile(q, far * q_b + up * q_h, t, q_t, live, d, d_in)
    key = _tile(k, far * k_b + up * k_h, t, k_t, live, d, d_in)
    left = _tile(a, far * a_b + up * a_h, t, a_t, live, d, d_in)
    right = _tile(b, far * b_b + up * b_h, t, b_t, live, d, d_in)
    dtype = query.dtype
    query = (query * tl.exp2(whole - middle[None, :])).to(dtype)
    right = (right * tl.exp2(before - middle[None, :])).to(dtype)
    key = (key * tl.exp2(middle[None, :] - whole)).to(dtype)
    left = (left * tl.exp2(middle[None, :] - whole)).to(dtype)
    seen, earlier = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    near = tl.where(seen, tl.dot(query, tl.trans(key)), 0.0) * scale
    near_left = tl.where(seen, tl.dot(query, tl.trans(left)), 0.0) * scale
    lower = tl.where(earlier, tl.dot(right, tl.trans(left)), 0.0)
    known = tl.where(earlier, tl.dot(right, tl.trans(key)), 0.0)
    # As in the delta rule's, from the inverses of halves; here of I − lower.
    solved = (i[:, None] == i[None, :]).to(tl.float32) + tl.where(_halves(i, 1), lower, 0.0)
    for level in tl.static_range(1, 4):
        between = tl.where(_halves(i, 2**level), lower, 0.0)
        part = tl.dot(solved, between, input_precision="tf32")
        solved += tl.dot(part, solved, input_precision="tf32")
    known = tl.dot(solved, known, input_precision="tf32")
    cell = ((far * heads + up) * tokens + t[:, None]) * (4 * C) + i[None, :]
    kind = squares.dtype.element_ty
    tl.store(squares + cell, near.to(kind), mask=live[:, None])
    tl.store(squares + cell + C, near_left.to(kind), mask=live[:, None])
    tl.store(squares + cell + 2 * C, solved.to(kind), mask=live[:, None])
    tl.store(squares + cell + 3 * C, known.to(kind), mask=live[:, None])


@triton.jit(do_not_specialize=["heads", "tokens", "scale"])
@no_type_check
def _onwards(
    q, k, v, a, b, g, squares, written, out, start_state, end_state, offsets, heads, tokens, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, a_b, a_h, a_t, b_b, b_h, b_t, g_b, g_h, g_t, v_b, v_h, v_t,
    o_b, o_h, o_t,
    dk: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, DECAY: tl.constexpr, dv: tl.constexpr,
    BV: tl.constexpr, PACKED: tl.constexpr, START: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    """One sequence of one head forwards, for BV columns of v."""
    column, sequence = tl.program_id(0), tl.program_id(1)
    far, up = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    begin, stop = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    d, e, i = tl.arange(0, DK), column * BV + tl.arange(0, BV), tl.arange(0, C)
    d_in, e_in = d < dk, e < dv
    cell = ((sequence if PACKED else far) * heads + up) * dk * dv
    cell += d[:, None].to(tl.int64) * dv + e[None, :]
    inside = d_in[:, None] & e_in[None, :]
    state = tl.zeros((DK, BV), tl.float32)
    if START:
        state += tl.load(start_state + cell, mask=inside, other=0.0)
    row = (far * heads + up) * tokens
    for n in range(tl.cdiv(stop - begin, C)):
        at = begin + n * C
        t, live = (at + i).to(tl.int64), at + i < stop
        whole, before, chunk, _ = _fades(g, far * g_b + up * g_h, t, live, d, d_in, g_t, C, DK, DECAY)
        query = _tile(q, far * q_b + up * q_h, t, q_t, live, d, d_in)
        key = _tile(k, far * k_b + up * k_h, t, k_t, live, d, d_in)
        left = _tile(a, far * a_b + up * a_h, t, a_t, live, d, d_in)
        right = _tile(b, far * b_b + up * b_h, t, b_t, live, d, d_in)
        value = _tile(v, far * v_b + up * v_h, t, v_t, live, e, e_in)
        square = squares + (row + t[:, None]) * (4 * C) + i[None, :]
        near = tl.load(square, mask=live[:, None], other=0.0)
        near_left = tl.load(square + C, mask=live[:, None], other=0.0)
        solved = tl.load(square + 2 * C, mask=live[:, None], other=0.0)
        known = tl.load(square + 3 * C, mask=live[:, None], other=0.0)
        dtype = query.dtype
        low = state.to(dtype)
        read = tl.dot((right * tl.exp2(before)).to(dtype), low).to(dtype)
        new = tl.dot(solved, read, tl.dot(known, value)).to(dtype)
        y = tl.dot((query * tl.exp2(whole)).to(dtype), low) * scale
        y = tl.dot(near_left, new, tl.dot(near, value, y))
        shown = live[:, None] & e_in[None, :]
        o_at = far * o_b + up * o_h + t[:, None] * o_t + e[None, :]
        tl.store(out + o_at, y.to(out.dtype.element_ty), mask=shown)
        if WRITTEN:
            tl.store(written + o_at, new, mask=shown)
        leaving = tl.exp2(chunk[None, :] - whole)
        state = state * tl.exp2(chunk)[:, None]
        state = tl.dot(tl.trans((key * leaving).to(dtype)), value, state)
        state = tl.dot(tl.trans((left * leaving).to(dtype)), new, state)
    tl.store(end_state + cell, state, mask=inside)


@triton.jit(do_not_specialize=["heads", "tokens", "scale"])
@no_type_check
def _back(
    q, k, a, b, g, squares, d_out, x, d_v, end_grad, start_grad, offsets, heads, tokens, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, a_b, a_h, a_t, b_b, b_h, b_t, g_b, g_h, g_t, o_b, o_h, o_t,
    x_b, x_h, x_t,
    dk: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, DECAY: tl.constexpr, dv: tl.constexpr,
    BV: tl.constexpr, PACKED: tl.constexpr, END: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """One sequence of one head backwards, for BV columns of v: X and dV."""
    column, sequence = tl.program_id(0), tl.program_id(1)
    far, up = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    begin, stop = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    d, e, i = tl.arange(0, DK), column * BV + tl.arange(0, BV), tl.arange(0, C)
    d_in, e_in = d < dk, e < dv
    cell = ((sequence if PACKED else far) * heads + up) * dk * dv
    cell += d[:, None].to(tl.int64) * dv + e[None, :]
    inside = d_in[:, None] & e_in[None, :]
    grad = tl.zeros((DK, BV), tl.float32)
    if END:
        grad += tl.load(end_grad + cell, mask=inside, other=0.0)
    row = (far * heads + up) * tokens
    chunks = tl.cdiv(stop - begin, C)
    for n in range(chunks):
        at = begin + (chunks - 1 - n) * C
        t, live = (at + i).to(tl.int64), at + i < stop
        whole, before, chunk, _ = _fades(g, far * g_b + up * g_h, t, live, d, d_in, g_t, C, DK, DECAY)
        query = _tile(q, far * q_b + up * q_h, t, q_t, live, d, d_in)
        key = _tile(k, far * k_b + up * k_h, t, k_t, live, d, d_in)
        left = _tile(a, far * a_b + up * a_h, t, a_t, live, d, d_in)
        right = _tile(b, far * b_b + up * b_h, t, b_t, live, d, d_in)
        above = _tile(d_out, far * o_b + up * o_h, t, o_t, live, e, e_in)
        square = squares + (row + t[:, None]) * (4 * C) + i[None, :]
        near = tl.load(square, mask=live[:, None], other=0.0)
        near_left = tl.load(square + C, mask=live[:, None], other=0.0)
        solved = tl.load(square + 2 * C, mask=live[:, None], other=0.0)
        known = tl.load(square + 3 * C, mask=live[:, None], other=0.0)
        dtype = query.dtype
        low, leaving = grad.to(dtype), tl.exp2(chunk[None, :] - whole)
        reached = tl.dot((left * leaving).to(dtype), low)
        reached = tl.dot(tl.trans(near_left), above, reached).to(dtype)
        each = tl.dot(tl.trans(solved), reached).to(dtype)
        of_value = tl.dot((key * leaving).to(dtype), low)
        of_value = tl.dot(tl.trans(known), reached, tl.dot(tl.trans(near), above, of_value))
        shown = live[:, None] & e_in[None, :]
        x_at = far * x_b + up * x_h + t[:, None] * x_t + e[None, :]
        tl.store(x + x_at, each, mask=shown)
        tl.store(d_v + x_at, of_value.to(d_v.dtype.element_ty), mask=shown)
        grad = grad * tl.exp2(chunk)[:, None]
        grad = tl.dot(tl.trans((query * tl.exp2(whole) * scale).to(dtype)), above, grad)
        grad = tl.dot(tl.trans((right * tl.exp2(before)).to(dtype)), each, grad)
    if START:
        tl.store(start_grad + cell, grad, mask=inside)
