"""A linear recurrence in one sweep over chunks of tokens.

    o_t = scale · (Σ_{s ≤ t} Σ_d q_td k_sd e^{G_td − G_sd} v_s + S_0ᵀ (e^{G_t} ⊙ q_t)),  G_t = Σ_{r≤t} g_r

g is one number a head, a token and head, or a token and channel of the keys. A program keeps the state
of one head, for some columns of v, and goes through its stretch of tokens: the products within a chunk,
those with the state, then the state's own step. Backwards in time (`reverse`) the weight of token s ≥ t
has e^{G_s − G_t}. A token may be left out of its own output (`strict`).

Where heads are too few to fill the device, a sequence is cut into stretches: a first sweep finds what
each adds to the state, and every program of the second begins with the sum of those before its own.

Channels that decay each by themselves take their decays up to the middle of a chunk, as does the state
meanwhile, so that a chunk is short and none decays by more than 2^−12 a token: what that leaves is beyond
half precision.

Cost: 2·n·(c + d)·d multiply-adds a head for chunks of c tokens; reads q, k and v once for every `BV`
columns of v, and k and v once more where there are several stretches.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

#: Least log₂ decay of a token: 2^−86 is nothing beside any number of a state …
LEAST = -86.0
#: … and of a channel, which the middle of its chunk must be able to undo.
LEAST_OF_CHANNEL = -12.0
LOG2E = 1.4426950408889634
_LEAST, _CHANNEL, _LOG2E = tl.constexpr(LEAST), tl.constexpr(LEAST_OF_CHANNEL), tl.constexpr(LOG2E)


@triton.jit
@no_type_check
def _decays(g, head, t, live, count, n_h, n_t, C: tl.constexpr, DECAY: tl.constexpr):
    """Log₂ decays up to and with each token of a chunk, and of the whole chunk."""
    if DECAY == 1:
        rate = tl.maximum(tl.load(g + head * n_h).to(tl.float32) * _LOG2E, _LEAST)
        # Behind the last token nothing decays any more: the rest of a chunk must not be made to grow.
        whole = rate * tl.minimum(tl.arange(0, C) + 1, count).to(tl.float32)
        return whole, rate * count.to(tl.float32)
    each = tl.load(g + t * n_t, mask=live, other=0.0).to(tl.float32)
    each = tl.maximum(each * _LOG2E, _LEAST)
    return tl.cumsum(each, axis=0), tl.sum(each, axis=0)


@triton.jit
@no_type_check
def _channel_decays(g, t, live, c, c_in, n_t, C: tl.constexpr):
    """Of every channel c: each token's, up to and with it, of the chunk, and up to the chunk's middle."""
    each = tl.load(g + t[:, None] * n_t + c[None, :], mask=live[:, None] & c_in[None, :], other=0.0)
    each = tl.maximum(each.to(tl.float32) * _LOG2E, _CHANNEL)
    first = tl.where(tl.arange(0, C)[:, None] < C // 2, each, 0.0)
    return each, tl.cumsum(each, axis=0), tl.sum(each, axis=0), tl.sum(first, axis=0)


@triton.jit(do_not_specialize=["heads", "tokens", "stretches", "scale"])
@no_type_check
def _sweep(
    q, k, v, g, x, out, dots, begins, first, last, added, faded, start_state, end_state,
    kept, meetings, numbers, heads, tokens, stretches, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, x_b, x_h, x_t, o_b, o_h, o_t,
    dk: tl.constexpr, dv: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, SEVERAL: tl.constexpr,
    STATES: tl.constexpr, DOTS: tl.constexpr, START: tl.constexpr, END: tl.constexpr,
    KEEP: tl.constexpr, MEET: tl.constexpr, EVERY: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """One stretch of one head, for BV columns of v.

    DECAY: 0 none, 1 of heads, 2 of tokens, 3 of channels of the keys. With STATES only what the stretch
    adds to the state is found. DOTS: also Σ out ⊙ x of every token. KEEP: also the states before every
    EVERY-th chunk; MEET: also Σ_d of those, kept by another sweep, times the states of this one that
    reach there from behind. STRICT: no token sees itself.
    """
    column, stretch = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    far, up = batch.to(tl.int64), head.to(tl.int64)
    q += far * q_b + up * q_h
    k += far * k_b + up * k_h
    v += far * v_b + up * v_h
    if DECAY > 1:
        g += far * g_b + up * g_h
    begin, stop = tl.load(begins + stretch), tl.load(begins + stretch + 1)
    d, e = tl.arange(0, DK), column * BV + tl.arange(0, BV)
    d_in, e_in = d < dk, e < dv
    cell = d[:, None].to(tl.int64) * dv + e[None, :]
    inside = d_in[:, None] & e_in[None, :]
    state = tl.zeros((DK, BV), tl.float32)
    row = (far * heads + head) * stretches
    from_here, to_here = tl.load(first + stretch), tl.load(last + stretch)
    sequence = (tl.load(last + stretches + stretch) if PACKED else far) * heads + head
    if not STATES:
        if START:
            state += tl.load(start_state + sequence * dk * dv + cell, mask=inside, other=0.0)
        if SEVERAL:
            for n in range(to_here - stretch if REVERSE else stretch - from_here):
                j = row + (to_here - n if REVERSE else from_here + n)
                if DECAY == 3:
                    state *= tl.exp2(tl.load(faded + j * dk + d, mask=d_in, other=0.0))[:, None]
                elif DECAY > 0:
                    state *= tl.exp2(tl.load(faded + j))
                state += tl.load(added + j * dk * dv + cell, mask=inside, other=0.0)
    total = tl.zeros((DK,), tl.float32) if DECAY == 3 else 0.0
    i = tl.arange(0, C)
    chunks = tl.cdiv(stop - begin, C)
    slot = (far * heads + head) * tl.load(numbers + stretches) + tl.load(numbers + stretch)
    for n in range(chunks):
        c = chunks - 1 - n if REVERSE else n
        if KEEP and c % EVERY == 0:
            place = kept + (slot + c // EVERY) * dk * dv + cell
            tl.store(place, state.to(kept.dtype.element_ty), mask=inside)
        at = begin + c * C
        t = at + i
        live = t < stop
        long = t.to(tl.int64)
        key = tl.load(
            k + long[:, None] * k_t + d[None, :], mask=live[:, None] & d_in[None, :], other=0.0
        )
        value = tl.load(
            v + long[:, None] * v_t + e[None, :], mask=live[:, None] & e_in[None, :], other=0.0
        )
        if DECAY == 3:
            _, whole, chunk, middle = _channel_decays(g, long, live, d, d_in, g_t, C)
            # What is asked and what is there meet in the middle of the chunk, and so does the state.
            asked = middle[None, :] - whole if REVERSE else whole - middle[None, :]
            key = (key * tl.exp2(-asked)).to(key.dtype)
            state *= tl.exp2(chunk - middle if REVERSE else middle)[:, None]
        elif DECAY > 0:
            whole, chunk = _decays(g, head, long, live, tl.minimum(stop - at, C), g_h, g_t, C, DECAY)
        if not STATES:
            query = tl.load(
                q + long[:, None] * q_t + d[None, :], mask=live[:, None] & d_in[None, :], other=0.0
            )
            if DECAY == 3:
                query = (query * tl.exp2(asked)).to(query.dtype)
            ahead = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]
            seen = ahead > 0 if STRICT else ahead >= 0
            pairs = tl.dot(query, tl.trans(key))
            if DECAY == 1 or DECAY == 2:
                apart = whole[None, :] - whole[:, None] if REVERSE else whole[:, None] - whole[None, :]
                pairs *= tl.exp2(tl.where(seen, apart, -1000.0))
            else:
                pairs = tl.where(seen, pairs, 0.0)
            y = tl.dot(query, state.to(query.dtype))
            if DECAY == 1 or DECAY == 2:
                y *= tl.exp2(chunk - whole if REVERSE else whole)[:, None]
            y = tl.dot(pairs.to(value.dtype), value, y) * scale
            shown = live[:, None] & e_in[None, :]
            o_at = far * o_b + up * o_h + long[:, None] * o_t + e[None, :]
            tl.store(out + o_at, y.to(out.dtype.element_ty), mask=shown)
            if DOTS:
                x_at = far * x_b + up * x_h + long[:, None] * x_t + e[None, :]
                other = tl.load(x + x_at, mask=shown, other=0.0).to(tl.float32)
                part = column.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
                tl.store(dots + part * tokens + long, tl.sum(y * other, axis=1), mask=live)
        if DECAY == 1 or DECAY == 2:
            value = (value * tl.exp2(whole if REVERSE else chunk - whole)[:, None]).to(value.dtype)
            state *= tl.exp2(chunk)
        state = tl.dot(tl.trans(key), value, state)
        if DECAY == 3:
            state *= tl.exp2(middle if REVERSE else chunk - middle)[:, None]
        if DECAY > 0:
            total += chunk
        if MEET and c % EVERY == 0:
            place = kept + (slot + c // EVERY) * dk * dv + cell
            met = tl.sum(tl.load(place, mask=inside, other=0.0).to(tl.float32) * state, axis=0)
            tl.store(meetings + (slot + c // EVERY) * dv + e, met, mask=e_in)
    if STATES:
        tl.store(added + (row + stretch) * dk * dv + cell, state, mask=inside)
        if DECAY == 3:
            tl.store(faded + (row + stretch) * dk + d, total, mask=d_in)
        elif DECAY > 0:
            tl.store(faded + row + stretch, total)
    if END and stretch == (from_here if REVERSE else to_here):
        tl.store(end_state + sequence * dk * dv + cell, state, mask=inside)
