"""The gradient of a decay of heads on a GPU, as a sum over pairs of tokens.

    ∂L/∂g = scale · Σ_{s<t} (t − s) e^{(t−s)g} (q_t·k_s)(∂y_t·v_s) + what the states at both ends add

Summed over tokens instead, it is a difference of sums weighted by positions, in which the rounding of
every token is multiplied by its distance from the end; here each pair is weighted by its own distance.
Within a chunk, products of inputs are exact in float32. From chunk to chunk go the state and its slope,

    S_t = e^g S_{t−1} + k_t v_tᵀ        P_t = ∂S_t/∂g = e^g (P_{t−1} + S_{t−1})
    ∂L/∂g = Σ_t scale · q_tᵀ P_t ∂y_t + ⟨∂S_T, P_T⟩

and what is in float32 (S, P, decayed values) enters products in `PARTS` parts of the inputs' type, which
together hold all of its bits. The result is as exact as that of plain operations in float32.

Cost: n·(4·PARTS·d + 2·c)·d multiply-adds a head for chunks of c tokens; reads q, k, v and ∂y once for
every `BV` columns of v, and k and v once more where there are several stretches.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import units
from attlas.kernels.delta import _tile
from attlas.kernels.sweep import _LEAST, _LOG2E, LEAST, LOG2E
from attlas.kernels.sweep_run import Shape, stretches, wanted

#: How sums over pairs are cut; 64 columns, as Triton 3.6 compiles fewer wrongly.
SHAPE = Shape(chunk=64, columns=64, warps=8, stages=2, programs=1)
#: Parts of 8 bits that hold float32's 24.
PARTS = 3


@triton.jit
@no_type_check
def _exact_dot(x, y, found, PARTS: tl.constexpr):
    """found + x @ y of y in float32, as a sum of parts in the type of x."""
    for _ in tl.static_range(PARTS):
        part = y.to(x.dtype)
        found = tl.dot(x, part, found, input_precision="ieee")
        y -= part.to(tl.float32)
    return found


@triton.jit(do_not_specialize=["heads", "stretches", "scale"])
@no_type_check
def _slope(
    q, k, v, d_out, g, begins, first, last, added, start_state, end_grad, found,
    heads, stretches, scale, g_h,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    dk: tl.constexpr, dv: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, PACKED: tl.constexpr, SEVERAL: tl.constexpr, STATES: tl.constexpr,
    START: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """∂L/∂g of one stretch of one head and BV columns of v; with STATES, what it adds to S and P."""
    column, stretch = tl.program_id(0), tl.program_id(1)
    far, up = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    begin, stop = tl.load(begins + stretch), tl.load(begins + stretch + 1)
    from_here, to_here = tl.load(first + stretch), tl.load(last + stretch)
    d, e, i = tl.arange(0, DK), column * BV + tl.arange(0, BV), tl.arange(0, C)
    d_in, e_in = d < dk, e < dv
    cell = d[:, None].to(tl.int64) * dv + e[None, :]
    inside = d_in[:, None] & e_in[None, :]
    rate = tl.maximum(tl.load(g + up * g_h).to(tl.float32) * _LOG2E, _LEAST)
    state, slope = tl.zeros((DK, BV), tl.float32), tl.zeros((DK, BV), tl.float32)
    row = (far * heads + up) * stretches
    sequence = (tl.load(last + stretches + stretch) if PACKED else far) * heads + up
    if not STATES:
        if START:
            state += tl.load(start_state + sequence * dk * dv + cell, mask=inside, other=0.0)
        if SEVERAL:
            for j in range(from_here, stretch):
                length = (tl.load(begins + j + 1) - tl.load(begins + j)).to(tl.float32)
                place = added + (row + j) * 2 * dk * dv + cell
                slope = (slope + length * state) * tl.exp2(rate * length)
                slope += tl.load(place + dk * dv, mask=inside, other=0.0)
                state *= tl.exp2(rate * length)
                state += tl.load(place, mask=inside, other=0.0)
    apart = tl.maximum(i[:, None] - i[None, :], 0).to(tl.float32)
    weight = apart * tl.exp2(rate * apart)
    steps = (i + 1).to(tl.float32)
    entering = tl.exp2(rate * steps)
    summed = tl.zeros((C,), tl.float32)
    for n in range(tl.cdiv(stop - begin, C)):
        at = begin + n * C
        t, live = (at + i).to(tl.int64), at + i < stop
        key = _tile(k, far * k_b + up * k_h, t, k_t, live, d, d_in)
        value = _tile(v, far * v_b + up * v_h, t, v_t, live, e, e_in)
        if not STATES:
            query = _tile(q, far * q_b + up * q_h, t, q_t, live, d, d_in)
            above = _tile(d_out, far * o_b + up * o_h, t, o_t, live, e, e_in)
            pairs = tl.dot(query, tl.trans(key), input_precision="ieee")
            pairs *= tl.dot(above, tl.trans(value), input_precision="ieee") * weight
            read = tl.zeros((C, BV), tl.float32)
            read = _exact_dot(query, state, read, PARTS) * steps[:, None]
            read = _exact_dot(query, slope, read, PARTS) * above.to(tl.float32)
            summed += tl.sum(pairs, axis=1) + tl.sum(read, axis=1) * entering
        # Behind the last token nothing is left, and the rest of a chunk must not be made to grow.
        count = tl.minimum(stop - at, C)
        left = tl.maximum(count - 1 - i, 0).to(tl.float32)
        value = value.to(tl.float32) * tl.exp2(rate * left)[:, None]
        steps_on = count.to(tl.float32)
        fade = tl.exp2(rate * steps_on)
        turned = tl.trans(key)
        slope = _exact_dot(turned, value * left[:, None], (slope + steps_on * state) * fade, PARTS)
        state = _exact_dot(turned, value, state * fade, PARTS)
    if STATES:
        place = added + (row + stretch) * 2 * dk * dv + cell
        tl.store(place, state, mask=inside)
        tl.store(place + dk * dv, slope, mask=inside)
    else:
        total = tl.sum(summed, axis=0) * scale
        if END and stretch == to_here:
            above_end = tl.load(end_grad + sequence * dk * dv + cell, mask=inside, other=0.0)
            total += tl.sum(above_end * slope)
        tl.store(found + column * tl.num_programs(2) * stretches + row + stretch, total)


def gradient_of_heads(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, g: Tensor, *, offsets: tuple[int, ...],
    packed: bool, scale: float = 1.0, start: Tensor | None = None, d_end: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """∂L/∂g [heads] in float64, of outputs scale · Σ_{s≤t} (q_t·k_s) e^{(t−s)g} v_s.

    Of outputs that see later tokens instead, it is that with q and k, and v and d_out, exchanged.

    Args:
        q: [batch, heads, tokens, dk], channels contiguous, as all of them.
        k: of the same shape.
        v: [batch, heads, tokens, dv].
        d_out: gradients of outputs, of v's shape.
        g: log decays [heads].
        offsets: 0, tokens; or those of the packed sequences.
        packed: whether the batch of one is packed.
        scale: factor of outputs.
        start: states before the first tokens [sequences, heads, dk, dv] in float32, contiguous.
        d_end: gradients of the states behind the last, alike.
    """
    (batch, heads, tokens, dk), dv = q.shape, v.shape[-1]
    columns = triton.cdiv(dv, SHAPE.columns)
    many = wanted(SHAPE, columns * batch * heads, tokens, units(q.device))
    cut = stretches(offsets, packed, many, q.device)
    count = len(cut.first)
    several = count > (1 if cut.sequences is None else cut.sequences)
    added = torch.empty(batch * heads, count, 2, dk, dv, device=q.device) if several else None
    found = torch.empty(columns, batch, heads, count, device=q.device)
    for only_states in (True, False) if several else (False,):
        _slope[columns, count, batch * heads](
            q, k, v, d_out, g, cut.begins, cut.first, cut.last, added, start, d_end, found,
            heads, count, scale, g.stride(0), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *d_out.stride()[:3], dk=dk, dv=dv, C=SHAPE.chunk, DK=max(16, triton.next_power_of_2(dk)),
            BV=SHAPE.columns, PARTS=PARTS, PACKED=packed, SEVERAL=several, STATES=only_states,
            START=start is not None, END=d_end is not None, num_warps=SHAPE.warps,
            num_stages=SHAPE.stages,
        )  # fmt: skip
    # Below the least decay that the kernels know, a smaller one changes nothing.
    return found.double().sum((0, 1, 3)) * (g > LEAST / LOG2E)
