"""The delta rule on a GPU: what tokens write is solved for, and the rest is an additive recurrence.

    u_t = β_t (v_t − e^{g_t} S_{t−1}ᵀ k_t)     S_t = e^{g_t} S_{t−1} + k_t u_tᵀ     o_t = scale · S_tᵀ q_t

Within a chunk, with G_t the sum of its g up to t, L_ts = (k_t·k_s) e^{G_t − G_s} below the diagonal and
P_ts = scale · (q_t·k_s) e^{G_t − G_s} down to it,

    T = (I + β L)⁻¹      U = T β (V − (K e^G) S_0)      O = P U + scale · (Q e^G) S_0

T and P know nothing of a state, so one kernel finds them for all chunks at once; the sweep from chunk to
chunk is then four products. Backwards it is the same in reverse: with D_t the gradient of S_t, that of
u_t is x_t = D_tᵀ k_t, and

    X = Tᵀ (Pᵀ dO + (K e^{G_C − G}) D_C)      dV = β X
    D_0 = e^{G_C} D_C + scale · (Q e^G)ᵀ dO − (K e^G)ᵀ β X

Since S and D are additive recurrences of what is known then (of k against u; of q against dO and of k
against −βX), the other gradients are sweeps; `attlas.kernels.delta_run` calls them all.

Cost: n·(2c + 3d)·d multiply-adds a head for chunks of c tokens, and n·(4c² + 2cd) for T and P; reads
q, k, v, T and P once for every `BV` columns of v.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.sweep import _LEAST, _LOG2E


@triton.jit
@no_type_check
def _tile(x, at, t, step, live, c, c_in):
    """Rows of tokens t, channels c; zeros where there are none."""
    place = at + t[:, None] * step + c[None, :]
    return tl.load(x + place, mask=live[:, None] & c_in[None, :], other=0.0)


@triton.jit
@no_type_check
def _sums(g, at, t, live, step, DECAY: tl.constexpr):
    """Log₂ decays up to and with each token of a chunk, and of the whole chunk."""
    each = t.to(tl.float32) * 0.0
    if DECAY:
        each = tl.load(g + at + t * step, mask=live, other=0.0).to(tl.float32)
        each = tl.maximum(each * _LOG2E, _LEAST)
    return tl.cumsum(each, axis=0), tl.sum(each, axis=0)


@triton.jit
@no_type_check
def _strengths(beta, at, t, live, step):
    return tl.load(beta + at + t * step, mask=live, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _halves(i, half: tl.constexpr):
    """Where rows lie in the second and columns in the first half of the same 2 · half tokens."""
    rows, columns = i[:, None] // half, i[None, :] // half
    return (rows // 2 == columns // 2) & (rows > columns)


@triton.jit
@no_type_check
def _inverse(lower, C: tl.constexpr, B: tl.constexpr):
    """(I + lower)⁻¹ of a strictly lower triangular matrix.

    Of blocks twice as long each time, from the inverses T of their halves and N between those:
    T − T N T. (A series in powers of `lower` would be shorter, but they grow like binomials and cancel.)
    Blocks up to B stand in a batch of small products.
    """
    n: tl.constexpr = C // B
    blocks, i = tl.arange(0, n), tl.arange(0, C)
    r = tl.arange(0, B)
    same = (blocks[:, None] == blocks[None, :])[:, None, :, None]
    own = tl.sum(tl.where(same, tl.reshape(lower, (n, B, n, B)), 0.0), axis=2)
    eye = (r[:, None] == r[None, :]).to(tl.float32)
    solved = eye[None, :, :] - tl.where(_halves(r, 1)[None, :, :], own, 0.0)
    for level in tl.static_range(1, 4):
        between = tl.where(_halves(r, 2**level)[None, :, :], own, 0.0)
        part = tl.dot(solved, between, input_precision="tf32")
        solved -= tl.dot(part, solved, input_precision="tf32")
    solved = tl.reshape(tl.where(same, solved[:, :, None, :], 0.0), (C, C))
    for level in tl.static_range(4, 6):
        between = tl.where(_halves(i, 2**level), lower, 0.0)
        part = tl.dot(solved, between, input_precision="tf32")
        solved -= tl.dot(part, solved, input_precision="tf32")
    return solved


@triton.jit(do_not_specialize=["heads", "tokens", "scale"])
@no_type_check
def _within(
    q, k, g, beta, near, inverse, offsets, heads, tokens, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, g_b, g_h, g_t, b_b, b_h, b_t,
    dk: tl.constexpr, C: tl.constexpr, B: tl.constexpr, DK: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """P and T of one chunk."""
    begin, stop = tl.load(offsets + tl.program_id(1)), tl.load(offsets + tl.program_id(1) + 1)
    at = begin + tl.program_id(0) * C
    if at >= stop:
        return
    far, up = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    i = tl.arange(0, C)
    t = (at + i).to(tl.int64)
    live = at + i < stop
    d = tl.arange(0, DK)
    d_in = d < dk
    key = _tile(k, far * k_b + up * k_h, t, k_t, live, d, d_in)
    query = _tile(q, far * q_b + up * q_h, t, q_t, live, d, d_in)
    whole, _ = _sums(g, far * g_b + up * g_h, t, live, g_t, DECAY)
    strength = _strengths(beta, far * b_b + up * b_h, t, live, b_t)
    fade = tl.exp2(tl.where(i[:, None] >= i[None, :], whole[:, None] - whole[None, :], -1000.0))
    pairs = tl.dot(query, tl.trans(key)) * fade * scale
    lower = tl.where(i[:, None] > i[None, :], tl.dot(key, tl.trans(key)) * fade, 0.0)
    cell = ((far * heads + up) * tokens + t[:, None]) * C + i[None, :]
    tl.store(near + cell, pairs.to(near.dtype.element_ty), mask=live[:, None])
    solved = _inverse(lower * strength[:, None], C, B)
    tl.store(inverse + cell, solved.to(inverse.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["heads", "tokens", "scale"])
@no_type_check
def _onwards(
    q, k, v, g, beta, near, inverse, written, out, start_state, end_state, offsets,
    heads, tokens, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, b_b, b_h, b_t, o_b, o_h, o_t,
    dk: tl.constexpr, dv: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, START: tl.constexpr, WRITTEN: tl.constexpr,
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
        t = (at + i).to(tl.int64)
        live = at + i < stop
        shown = live[:, None]
        key = _tile(k, far * k_b + up * k_h, t, k_t, live, d, d_in)
        query = _tile(q, far * q_b + up * q_h, t, q_t, live, d, d_in)
        value = _tile(v, far * v_b + up * v_h, t, v_t, live, e, e_in)
        square = (row + t[:, None]) * C + i[None, :]
        pairs = tl.load(near + square, mask=shown, other=0.0)
        solved = tl.load(inverse + square, mask=shown, other=0.0)
        strength = _strengths(beta, far * b_b + up * b_h, t, live, b_t)
        whole, chunk = _sums(g, far * g_b + up * g_h, t, live, g_t, DECAY)
        before = state.to(key.dtype)
        entering = tl.exp2(whole)[:, None]
        short = (value - entering * tl.dot(key, before)) * strength[:, None]
        new = tl.dot(solved, short.to(key.dtype))
        low = new.to(key.dtype)
        y = tl.dot(query, before) * entering * scale
        y = tl.dot(pairs, low, y)
        o_at = far * o_b + up * o_h + t[:, None] * o_t + e[None, :]
        tl.store(out + o_at, y.to(out.dtype.element_ty), mask=shown & e_in[None, :])
        if WRITTEN:
            tl.store(written + o_at, low, mask=shown & e_in[None, :])
        left = (new * tl.exp2(chunk - whole)[:, None]).to(key.dtype)
        state = tl.dot(tl.trans(key), left, state * tl.exp2(chunk))
    tl.store(end_state + cell, state, mask=inside)


@triton.jit(do_not_specialize=["heads", "tokens", "scale"])
@no_type_check
def _back(
    q, k, v, g, beta, near, inverse, d_out, x, d_v, dots, end_grad, start_grad, offsets,
    heads, tokens, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, b_b, b_h, b_t, o_b, o_h, o_t,
    x_b, x_h, x_t,
    dk: tl.constexpr, dv: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, END: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """One sequence of one head backwards, for BV columns of v: x, βx and Σ x ⊙ v of every token."""
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
    part = (column.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * tokens
    chunks = tl.cdiv(stop - begin, C)
    for n in range(chunks):
        at = begin + (chunks - 1 - n) * C
        t = (at + i).to(tl.int64)
        live = at + i < stop
        shown = live[:, None]
        key = _tile(k, far * k_b + up * k_h, t, k_t, live, d, d_in)
        query = _tile(q, far * q_b + up * q_h, t, q_t, live, d, d_in)
        value = _tile(v, far * v_b + up * v_h, t, v_t, live, e, e_in)
        up_grad = _tile(d_out, far * o_b + up * o_h, t, o_t, live, e, e_in)
        square = (row + t[:, None]) * C + i[None, :]
        pairs = tl.load(near + square, mask=shown, other=0.0)
        solved = tl.load(inverse + square, mask=shown, other=0.0)
        strength = _strengths(beta, far * b_b + up * b_h, t, live, b_t)
        whole, chunk = _sums(g, far * g_b + up * g_h, t, live, g_t, DECAY)
        reached = tl.dot(key, grad.to(key.dtype)) * tl.exp2(chunk - whole)[:, None]
        reached = tl.dot(tl.trans(pairs), up_grad, reached)
        each = tl.dot(tl.trans(solved), reached.to(key.dtype))
        x_at = far * x_b + up * x_h + t[:, None] * x_t + e[None, :]
        tl.store(x + x_at, each.to(x.dtype.element_ty), mask=shown & e_in[None, :])
        tl.store(dots + part + t, tl.sum(each * value, axis=1), mask=live)
        each *= strength[:, None]
        tl.store(d_v + x_at, each.to(d_v.dtype.element_ty), mask=shown & e_in[None, :])
        entering = tl.exp2(whole)[:, None]
        asked = (up_grad * entering * scale).to(key.dtype)
        grad = tl.dot(tl.trans(query), asked, grad * tl.exp2(chunk))
        grad = tl.dot(tl.trans(key), (-each * entering).to(key.dtype), grad)
    if START:
        tl.store(start_grad + cell, grad, mask=inside)


@triton.jit(do_not_specialize=["heads", "tokens"])
@no_type_check
def _of_keys(
    k, u, x, beta, dots, from_out, from_writing, read, d_k, d_beta, heads, tokens,
    k_b, k_h, k_t, u_b, u_h, u_t, b_b, b_h, b_t, o_b, o_h, o_t,
    dk: tl.constexpr, dv: tl.constexpr, TOKENS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and strengths, from sweeps whose sums count a token's own part.

    dk = D u − β y,  dβ = x·v − k·y  with y = e^g S_{t−1} x; both sweeps of x and u hold (x·u) k besides.
    """
    far, up = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live, t = i < tokens, i.to(tl.int64)
    d, e = tl.arange(0, DK), tl.arange(0, DV)
    keys, values = live[:, None] & (d < dk)[None, :], live[:, None] & (e < dv)[None, :]
    k_at = far * k_b + up * k_h + t[:, None] * k_t + d[None, :]
    u_at = far * u_b + up * u_h + t[:, None] * u_t + e[None, :]
    o_at = far * o_b + up * o_h + t[:, None] * o_t + d[None, :]
    key = tl.load(k + k_at, mask=keys, other=0.0).to(tl.float32)
    wrote = tl.load(u + u_at, mask=values, other=0.0).to(tl.float32)
    each = tl.load(x + u_at, mask=values, other=0.0).to(tl.float32)
    strength = _strengths(beta, far * b_b + up * b_h, t, live, b_t)
    row = (far * heads + up) * tokens + t
    own = tl.sum(wrote * each, axis=1)[:, None] * key
    y = tl.load(read + o_at, mask=keys, other=0.0).to(tl.float32) - own
    grad = tl.load(from_out + o_at, mask=keys, other=0.0).to(tl.float32)
    grad -= tl.load(from_writing + o_at, mask=keys, other=0.0).to(tl.float32)
    grad += strength[:, None] * (own - y)
    tl.store(d_k + o_at, grad.to(d_k.dtype.element_ty), mask=keys)
    of_strength = tl.load(dots + row, mask=live, other=0.0) - tl.sum(key * y, axis=1)
    tl.store(d_beta + row, of_strength, mask=live)
