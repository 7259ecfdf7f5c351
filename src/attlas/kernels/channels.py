"""Gradients of a recurrence whose channels decay each by themselves, low-rank update included, on a GPU.

    S_t = e^{g_t} S_{t−1} + k_t v_tᵀ + a_t u_tᵀ           dq_t = scale · S_t ∂y_t      db_t = S_{t−1} x_t
    D_t = e^{G_T − G_t} D_T + scale · Σ_{r≥t} e^{G_r − G_t} q_r ∂y_rᵀ + Σ_{r>t} e^{G_{r−1} − G_t} b_r x_rᵀ
    dk_t = D_t v_t      da_t = D_t u_t

with u_t = S_{t−1}ᵀ b_t and x_t its gradient; without a and b, an additive recurrence. One sweep forwards
holds S and reads it twice a token, one backwards D: two tokens' sources become one state, and neither is
written for every token. A program keeps the state's rows for some channels, [v_dim, channels].

Of the decays, with z = q ⊙ dq and w = b ⊙ db,

    dg_t = Σ_{r≥t} (z_r − k_r ⊙ dk_r − a_r ⊙ da_r) + Σ_{r>t} w_r

summed to the end of a segment only, from S ⊙ D there, where both sweeps meet: were it summed over
everything, what the two round differently would add up. As in `attlas.kernels.sweep`, decays are taken up
to the middle of a chunk.

Cost: 4·n·(2c + d)·d multiply-adds a head and sweep of a low-rank update for chunks of c tokens, and
2·n·(c + d)·d of an additive one. In each sweep all inputs are read once for every `BC` channels, and
sources once more where there are several stretches. n/64 states are kept in half precision for decays'
gradients.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.delta import _tile
from attlas.kernels.sweep import _CHANNEL, _channel_decays


@triton.jit
@no_type_check
def _within(rows, source, near, seen, found):
    """found + what rows see of a chunk's source."""
    pairs = tl.where(seen, tl.dot(rows, tl.trans(source)), 0.0)
    return tl.dot(pairs.to(near.dtype), near, found)


@triton.jit
@no_type_check
def _meeting(place, state, inside):
    """Σ S ⊙ D of every channel."""
    return tl.sum(tl.load(place, mask=inside, other=0.0).to(tl.float32) * state, axis=0)


@triton.jit(do_not_specialize=["heads", "stretches", "scale"])
@no_type_check
def _both(
    source, by, source_2, by_2, rows, other, rows_2, other_2, g, out, out_2, of_first, of_second,
    out_g, begins, first, last, added, faded, edge, share, kept, numbers, heads, stretches, scale,
    s_b, s_h, s_t, y_b, y_h, y_t, r_b, r_h, r_t, p_b, p_h, p_t, u_b, u_h, u_t,
    y2_b, y2_h, y2_t, p2_b, p2_h, p2_t, g_b, g_h, g_t, o_b, o_h, o_t,
    dk: tl.constexpr, dv: tl.constexpr, C: tl.constexpr, DV: tl.constexpr, BC: tl.constexpr,
    LOW: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, PACKED: tl.constexpr,
    SEVERAL: tl.constexpr, STATES: tl.constexpr, EDGE: tl.constexpr, WANTED: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """One stretch of one head, for BC channels, forwards (S) or backwards (D).

    The state is Σ source byᵀ, decayed, and read by `rows`: forwards of v kᵀ + u aᵀ by ∂y and x, for dq
    and db; backwards (REVERSE) of ∂y qᵀ + x bᵀ by v and u, for dk and da. `other` is q and b, or k and a.

    WANTED: forwards the products z and w are written too, and the state before every EVERY-th chunk;
    backwards they and the kept states give dg. LOW: whether there is a second source, and reader. STRICT:
    no token sees itself. EDGE: a state before the first token, or the gradient of the last, [dk, dv].
    """
    column, stretch = tl.program_id(0), tl.program_id(1)
    far, up = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    begin, stop = tl.load(begins + stretch), tl.load(begins + stretch + 1)
    from_here, to_here = tl.load(first + stretch), tl.load(last + stretch)
    e, c, i = tl.arange(0, DV), column * BC + tl.arange(0, BC), tl.arange(0, C)
    e_in, c_in = e < dv, c < dk
    inside = e_in[:, None] & c_in[None, :]
    cell = e[:, None].to(tl.int64) * dk + c[None, :]
    state = tl.zeros((DV, BC), tl.float32)
    row = (far * heads + up) * stretches
    sequence = (tl.load(last + stretches + stretch) if PACKED else far) * heads + up
    slot = (far * heads + up) * tl.load(numbers + stretches) + tl.load(numbers + stretch)
    later = tl.zeros((BC,), tl.float32)
    if not STATES:
        if EDGE:
            turned = edge + sequence * dk * dv + c[None, :].to(tl.int64) * dv + e[:, None]
            state += tl.load(turned, mask=inside, other=0.0)
        if SEVERAL:
            for n in range(to_here - stretch if REVERSE else stretch - from_here):
                j = row + (to_here - n if REVERSE else from_here + n)
                state *= tl.exp2(tl.load(faded + j * dk + c, mask=c_in, other=0.0))[None, :]
                state += tl.load(added + j * dk * dv + cell, mask=inside, other=0.0)
        if REVERSE and WANTED:
            if stretch != to_here:
                behind = slot + tl.cdiv(stop - begin, C * EVERY)
                later = _meeting(kept + behind * dk * dv + cell, state, inside)
            elif EDGE:
                later = tl.load(share + sequence * dk + c, mask=c_in, other=0.0)
    total = tl.zeros((BC,), tl.float32)
    ahead = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]
    seen, earlier = ahead >= 0, ahead > 0
    if STRICT:
        seen = earlier
    chunks = tl.cdiv(stop - begin, C)
    for n in range(chunks):
        m = chunks - 1 - n if REVERSE else n
        if WANTED and not REVERSE and not STATES and m % EVERY == 0:
            place = kept + (slot + m // EVERY) * dk * dv + cell
            tl.store(place, state.to(kept.dtype.element_ty), mask=inside)
        at = begin + m * C
        t, live = (at + i).to(tl.int64), at + i < stop
        shown = live[:, None] & c_in[None, :]
        from_one = _tile(source, far * s_b + up * s_h, t, s_t, live, e, e_in)
        near = _tile(by, far * y_b + up * y_h, t, y_t, live, c, c_in)
        kind = near.dtype
        each, whole, chunk, middle = _channel_decays(
            g + far * g_b + up * g_h, t, live, c, c_in, g_t, C
        )
        # From a token to the middle, and back; b and x stand before their token's own decay.
        up_to = whole - middle[None, :]
        with_q, with_k = tl.exp2(up_to), tl.exp2(-up_to)
        with_b = tl.exp2(up_to - each) if LOW else with_q
        near = (near * with_q * scale).to(kind) if REVERSE else (near * with_k).to(kind)
        if LOW:
            from_two = _tile(source_2, far * u_b + up * u_h, t, u_t, live, e, e_in)
            near_2 = _tile(by_2, far * y2_b + up * y2_h, t, y2_t, live, c, c_in)
            near_2 = (near_2 * (with_b if REVERSE else with_k)).to(kind)
        state *= tl.exp2(chunk - middle if REVERSE else middle)[None, :]
        if not STATES:
            low = state.to(kind)
            o_at = far * o_b + up * o_h + t[:, None] * o_t + c[None, :]
            asking = _tile(rows, far * r_b + up * r_h, t, r_t, live, e, e_in)
            y = _within(asking, from_one, near, seen, tl.dot(asking, low))
            if LOW:
                y = _within(asking, from_two, near_2, earlier if REVERSE else seen, y)
            y *= with_k if REVERSE else with_q * scale
            tl.store(out + o_at, y.to(out.dtype.element_ty), mask=shown)
            if WANTED:
                y *= _tile(other, far * p_b + up * p_h, t, p_t, live, c, c_in).to(tl.float32)
            if LOW:
                asking = _tile(rows_2, far * u_b + up * u_h, t, u_t, live, e, e_in)
                y_2 = _within(
                    asking, from_one, near, seen if REVERSE else earlier, tl.dot(asking, low)
                )
                y_2 = _within(asking, from_two, near_2, earlier, y_2)
                y_2 *= with_k if REVERSE else with_b
                tl.store(out_2 + o_at, y_2.to(out_2.dtype.element_ty), mask=shown)
                if WANTED:
                    factor = _tile(other_2, far * p2_b + up * p2_h, t, p2_t, live, c, c_in)
                    y_2 *= factor.to(tl.float32)
            if WANTED and not REVERSE:
                tl.store(of_first + o_at, y, mask=shown)
                if LOW:
                    tl.store(of_second + o_at, y_2, mask=shown)
            elif WANTED:
                sums = tl.load(of_first + o_at, mask=shown, other=0.0) - y
                if LOW:
                    own = tl.load(of_second + o_at, mask=shown, other=0.0)
                    sums += own - y_2
                grad = tl.cumsum(sums, axis=0, reverse=True) + later[None, :]
                if LOW:
                    grad -= own
                grad = tl.where(each > _CHANNEL, grad, 0.0)
                tl.store(out_g + o_at, grad.to(out_g.dtype.element_ty), mask=shown)
                later += tl.sum(sums, axis=0)
        state = tl.dot(tl.trans(from_one), near, state)
        if LOW:
            state = tl.dot(tl.trans(from_two), near_2, state)
        state *= tl.exp2(middle if REVERSE else chunk - middle)[None, :]
        total += chunk
        if REVERSE and WANTED and not STATES and m % EVERY == 0:
            later = _meeting(kept + (slot + m // EVERY) * dk * dv + cell, state, inside)
    if STATES:
        tl.store(added + (row + stretch) * dk * dv + cell, state, mask=inside)
        tl.store(faded + (row + stretch) * dk + c, total, mask=c_in)
