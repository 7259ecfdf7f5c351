"""Linear recurrences with one decay a head, or a token and head, in one sweep over the chunks.

    o_t = scale · Σ_{s ≤ t} e^{G_t − G_s} (q_t·k_s) v_s + scale · e^{G_t} S_0ᵀ q_t,  G_t = Σ_{r ≤ t} g_r

A program keeps the state of one head, for some columns of v, and goes through its stretch of tokens: the
products within a chunk, those with the state, then the state's own step. Backwards in time (`reverse`)
the weight of token s ≥ t is e^{G_s − G_t}. A gradient of the recurrence is three such sweeps:

    dq: k, v exchanged, do for q           dk: reverse, of v, do, q           dv: reverse, of k, q, do

Where heads are too few to fill the device, a sequence is cut into stretches: a first sweep finds what
each adds to the state, and every program of the second begins with the sum of those before its own.

Cost: 2·n·(c + d)·d multiply-adds a head for chunks of c tokens; reads q, k and v once for every `BV`
columns of v, and k and v once more where there are several stretches.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import units

#: Least log decay of a token: e^−60 is nothing beside any number of a state.
LEAST = -60.0
_LEAST, _LOG2E = tl.constexpr(LEAST), tl.constexpr(1.4426950408889634)
#: Programs on each multiprocessor that a sweep is cut for.
PROGRAMS = 2


@triton.jit
@no_type_check
def _decays(g, head, t, live, count, n_h, n_t, C: tl.constexpr, DECAY: tl.constexpr):
    """Log₂ decays up to and with each token of a chunk, and of the whole chunk."""
    if DECAY == 1:
        rate = tl.maximum(tl.load(g + head * n_h).to(tl.float32), _LEAST) * _LOG2E
        whole = rate * (tl.arange(0, C) + 1).to(tl.float32)
        return tl.minimum(whole, 0.0), rate * count.to(tl.float32)
    each = tl.load(g + t * n_t, mask=live, other=0.0).to(tl.float32)
    each = tl.maximum(each, _LEAST) * _LOG2E
    return tl.cumsum(each, axis=0), tl.sum(each, axis=0)


@triton.jit(do_not_specialize=["heads", "tokens", "stretches", "scale"])
@no_type_check
def _sweep(
    q, k, v, g, x, out, dots, begins, first, last, added, faded, start_state, end_state,
    heads, tokens, stretches, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, x_b, x_h, x_t, o_b, o_h, o_t,
    dk: tl.constexpr, dv: tl.constexpr, C: tl.constexpr, DK: tl.constexpr, BV: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, SEVERAL: tl.constexpr,
    STATES: tl.constexpr, DOTS: tl.constexpr, START: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """One stretch of one head, for BV columns of v.

    With STATES only what the stretch adds to the state is found. DOTS: also Σ out ⊙ x of every token.
    """
    column, stretch = tl.program_id(0), tl.program_id(1)
    batch, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    far, up = batch.to(tl.int64), head.to(tl.int64)
    q += far * q_b + up * q_h
    k += far * k_b + up * k_h
    v += far * v_b + up * v_h
    if DECAY == 2:
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
                j = to_here - n if REVERSE else from_here + n
                if DECAY > 0:
                    state *= tl.exp2(tl.load(faded + row + j))
                state += tl.load(added + (row + j) * dk * dv + cell, mask=inside, other=0.0)
    total = 0.0
    i = tl.arange(0, C)
    chunks = tl.cdiv(stop - begin, C)
    for n in range(chunks):
        at = begin + (chunks - 1 - n if REVERSE else n) * C
        t = at + i
        live = t < stop
        long = t.to(tl.int64)
        key = tl.load(
            k + long[:, None] * k_t + d[None, :], mask=live[:, None] & d_in[None, :], other=0.0
        )
        value = tl.load(
            v + long[:, None] * v_t + e[None, :], mask=live[:, None] & e_in[None, :], other=0.0
        )
        if DECAY > 0:
            whole, chunk = _decays(g, head, long, live, tl.minimum(stop - at, C), g_h, g_t, C, DECAY)
        if not STATES:
            query = tl.load(
                q + long[:, None] * q_t + d[None, :], mask=live[:, None] & d_in[None, :], other=0.0
            )
            pairs = tl.dot(query, tl.trans(key))
            seen = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
            if DECAY > 0:
                apart = whole[None, :] - whole[:, None] if REVERSE else whole[:, None] - whole[None, :]
                pairs *= tl.exp2(tl.where(seen, apart, -1000.0))
                y = tl.dot(query, state.to(query.dtype))
                y *= tl.exp2(chunk - whole if REVERSE else whole)[:, None]
            else:
                pairs = tl.where(seen, pairs, 0.0)
                y = tl.dot(query, state.to(query.dtype))
            y = tl.dot(pairs.to(value.dtype), value, y) * scale
            shown = live[:, None] & e_in[None, :]
            o_at = far * o_b + up * o_h + long[:, None] * o_t + e[None, :]
            tl.store(out + o_at, y.to(out.dtype.element_ty), mask=shown)
            if DOTS:
                x_at = far * x_b + up * x_h + long[:, None] * x_t + e[None, :]
                other = tl.load(x + x_at, mask=shown, other=0.0).to(tl.float32)
                part = column.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
                tl.store(dots + part * tokens + long, tl.sum(y * other, axis=1), mask=live)
        if DECAY > 0:
            value = (value * tl.exp2(whole if REVERSE else chunk - whole)[:, None]).to(value.dtype)
            state *= tl.exp2(chunk)
            total += chunk
        state = tl.dot(tl.trans(key), value, state)
    if STATES:
        tl.store(added + (row + stretch) * dk * dv + cell, state, mask=inside)
        if DECAY > 0:
            tl.store(faded + row + stretch, total)
    if END and stretch == (from_here if REVERSE else to_here):
        tl.store(end_state + sequence * dk * dv + cell, state, mask=inside)


@dataclass(frozen=True)
class Stretches:
    """Where a sweep's stretches lie: begins and ends, and each one's first and last of its sequence.

    Attributes:
        begins: token offsets [stretches + 1].
        first: number of the first stretch of each stretch's sequence.
        last: of the last; in a packed batch followed by the sequence's number.
        sequences: of a packed batch; None where every row is one.
    """

    begins: Tensor
    first: Tensor
    last: Tensor
    sequences: int | None


@lru_cache(maxsize=64)
def stretches(
    offsets: tuple[int, ...], packed: bool, count: int, chunk: int, device: torch.device
) -> Stretches:
    """Every sequence between two offsets in stretches of whole chunks, about `count` in all."""
    size = max(chunk, -(-offsets[-1] // count // chunk) * chunk)
    begins, first, last, number = [], [], [], []
    for n, (start, stop) in enumerate(pairwise(offsets)):
        own = range(start, max(stop, start + 1), size)
        first += [len(begins)] * len(own)
        last += [len(begins) + len(own) - 1] * len(own)
        number += [n] * len(own)
        begins += own
    table = [torch.tensor(x, dtype=torch.int32, device=device)
             for x in ([*begins, offsets[-1]], first, last + number if packed else last)]  # fmt: skip
    return Stretches(*table, len(offsets) - 1 if packed else None)


def sweep(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, offsets: tuple[int, ...], packed: bool,
    scale: float = 1.0, reverse: bool = False, start: Tensor | None = None, end: bool = False,
    x: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(out, the state behind the sweep, Σ out ⊙ x of every token) of one sweep.

    Args:
        q: [batch, heads, tokens, dk], channels contiguous, as all of them.
        k: of the same shape.
        v: [batch, heads, tokens, dv].
        g: log decays [heads] or [batch, heads, tokens] in float32, or None.
        offsets: 0, tokens; or those of the packed sequences.
        packed: whether the batch of one is packed.
        scale: factor of out.
        reverse: whether a token sees those behind it instead of those before.
        start: state before the first token of the sweep [sequences, heads, dk, dv] in float32.
        end: whether the state behind the last is wanted.
        x: what the rows of out are multiplied with, of out's shape.
    """
    batch, heads, tokens, dk = q.shape
    dv = v.shape[-1]
    c, bv, warps, stages = shape_of(dk, dv)
    columns = triton.cdiv(dv, bv)
    wanted = max(1, min(PROGRAMS * units(q.device) // (columns * batch * heads), tokens // (8 * c)))
    cut = stretches(offsets, packed, wanted, c, q.device)
    count = len(cut.first)
    sequences = batch if cut.sequences is None else cut.sequences
    out = torch.empty(batch, tokens, heads, dv, dtype=q.dtype, device=q.device).transpose(1, 2)
    state = torch.empty(sequences, heads, dk, dv, device=q.device) if end else None
    dots = torch.empty(columns, batch, heads, tokens, device=q.device) if x is not None else None
    decay = 0 if g is None else 1 if g.ndim == 1 else 2
    g_at = (0, 0, 0) if g is None else (0, g.stride(0), 0) if decay == 1 else g.stride()
    several = count > (1 if cut.sequences is None else cut.sequences)
    added = torch.empty(batch * heads, count, dk, dv, device=q.device) if several else None
    faded = torch.empty(batch * heads, count, device=q.device) if several else None
    for only_states in (True, False) if several else (False,):
        _sweep[columns, count, batch * heads](
            q, k, v, g, x, out, dots, cut.begins, cut.first, cut.last, added, faded, start, state,
            heads, tokens, count, scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *g_at, *((0, 0, 0) if x is None else x.stride()[:3]), *out.stride()[:3],
            dk=dk, dv=dv, C=c, DK=max(16, triton.next_power_of_2(dk)), BV=bv, DECAY=decay,
            REVERSE=reverse, PACKED=packed, SEVERAL=several, STATES=only_states, DOTS=x is not None,
            START=start is not None, END=end, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, state, None if dots is None else dots.sum(0)


def shape_of(dk: int, dv: int) -> tuple[int, int, int, int]:
    """(tokens of a chunk, columns of v, warps, stages) for these widths."""
    return 64, 64, 4 if dk <= 128 else 8, 2


class Scan(torch.autograd.Function):
    """The recurrence with its gradients: a sweep, and three."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, scale: float,
        offsets: tuple[int, ...], packed: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Outputs, and the state behind the last token."""
        out, end, _ = sweep(
            q, k, v, g, scale=scale, start=start, end=True, offsets=offsets, packed=packed
        )
        ctx.save_for_backward(q, k, v, g, start, end)
        ctx.given = {"offsets": offsets, "packed": packed, "scale": scale}
        assert end is not None
        return out, end

    @staticmethod
    def backward(ctx, d_out: Tensor, d_end: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        """Gradients of all that `forward` takes."""
        q, k, v, g, start, end = ctx.saved_tensors
        given, scale = ctx.given, ctx.given["scale"]
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        wants_g, wants_start = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        # The state's gradient meets no scale on its way, but a sweep's outputs do.
        after = None if d_end is None else d_end.float() / scale
        dq, _, dots_q = sweep(
            d_out, v, k, g, start=_turned(start), x=q if wants_g else None, **given
        )
        dk, _, dots_k = sweep(
            v, d_out, q, g, start=_turned(after), reverse=True, x=k if wants_g else None, **given
        )
        dv, d_start, _ = sweep(
            k, q, d_out, g, start=None if after is None else after.contiguous(), reverse=True,
            end=wants_start, **given,
        )  # fmt: skip
        dg = None
        if wants_g:
            dg = decay_gradient(dots_q - dots_k, end, d_end, g, given["offsets"])
        return dq, dk, dv, dg, None if d_start is None else d_start * scale, None, None, None


def decay_gradient(
    of_sums: Tensor, end: Tensor, d_end: Tensor | None, g: Tensor, offsets: tuple[int, ...]
) -> Tensor:
    """The gradient of every log decay from that of their sums G: a sum over all later tokens.

    Args:
        of_sums: q·dq − k·dk [batch, heads, tokens].
        end: states behind the last tokens, and `d_end` their gradient.
        d_end: None where the state was not used.
        g: log decays as `sweep` takes them.
        offsets: of the sequences.
    """
    if d_end is not None:  # e^G of the last token stands in the state, too
        share = (end * d_end).sum((-2, -1))  # [sequences, heads]
        lasts = [stop - 1 for start, stop in pairwise(offsets) if stop > start]
        if len(offsets) == 2:
            of_sums[:, :, -1] += share
        else:
            filled = [n for n, (start, stop) in enumerate(pairwise(offsets)) if stop > start]
            of_sums[0, :, lasts] += share[filled].mT
    parts = [part.flip(-1).cumsum(-1).flip(-1)
             for part in of_sums.split([b - a for a, b in pairwise(offsets)], dim=-1)]  # fmt: skip
    each = torch.cat(parts, dim=-1)
    if g.ndim == 1:
        each = each.sum((0, 2))
    return (each * (g > LEAST)).to(g.dtype)


def _turned(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.mT.contiguous()
