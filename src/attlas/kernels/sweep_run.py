"""Calls of the sweep: how it is cut for a device, and what it fills."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import units
from attlas.kernels.sweep import _sweep
from attlas.tracing import kept

#: Tokens from one state that is kept for gradients of decays to the next.
SEGMENT = 64


@dataclass(frozen=True)
class Stretches:
    """Where a sweep's stretches lie: begins and ends, and each one's first and last of its sequence.

    Attributes:
        begins: token offsets [stretches + 1].
        first: number of the first stretch of each stretch's sequence.
        last: of the last; in a packed batch followed by the sequence's number.
        numbers: each one's first segment among all, and how many segments there are.
        segments: that number.
        sequences: of a packed batch; None where every row is one.
    """

    begins: Tensor
    first: Tensor
    last: Tensor
    numbers: Tensor
    segments: int
    sequences: int | None


@kept(64)
def stretches(
    offsets: tuple[int, ...], packed: bool, count: int, device: torch.device
) -> Stretches:
    """Every sequence between two offsets in stretches of whole segments, about `count` in all."""
    size = max(SEGMENT, -(-offsets[-1] // count // SEGMENT) * SEGMENT)
    begins: list[int] = []
    first: list[int] = []
    last: list[int] = []
    sequence: list[int] = []
    numbers: list[int] = []
    segments = 0
    for n, (start, stop) in enumerate(pairwise(offsets)):
        own = range(start, max(stop, start + 1), size)
        first += [len(begins)] * len(own)
        last += [len(begins) + len(own) - 1] * len(own)
        sequence += [n] * len(own)
        begins += own
        numbers += [segments + (begin - start) // SEGMENT for begin in own]
        segments += -(-(stop - start) // SEGMENT)

    def table(x: list[int]) -> Tensor:
        return torch.tensor(x, dtype=torch.int32, device=device)

    return Stretches(
        table([*begins, offsets[-1]]), table(first), table(last + sequence if packed else last),
        table([*numbers, segments]), segments, len(offsets) - 1 if packed else None,
    )  # fmt: skip


class Swept(NamedTuple):
    """What a sweep found.

    Attributes:
        out: its outputs.
        state: behind it; None unless asked for.
        dots: Σ out ⊙ x of every token; None without x.
        kept: states before every segment, [batch · heads, segments, dk, dv]; None unless asked for.
        meetings: Σ_d of states that another sweep kept times this one's [batch · heads, segments, dv].
    """

    out: Tensor
    state: Tensor | None
    dots: Tensor | None
    kept: Tensor | None
    meetings: Tensor | None


@dataclass(frozen=True)
class Shape:
    """How a sweep is cut: tokens of a chunk, columns of v, warps, stages, programs a multiprocessor."""

    chunk: int
    columns: int
    warps: int
    stages: int
    programs: int


def shape_of(dv: int, channels: bool) -> Shape:
    """Measured on Hopper; columns below 64 with decays are compiled wrongly by Triton 3.6."""
    if channels:
        return Shape(16, 64 if dv <= 64 else 128, 4, 2, 4)
    return Shape(64, 64, 4, 3, 2)


def wanted(shape: Shape, programs: int, tokens: int, units: int) -> int:
    """Stretches that fill a device of so many multiprocessors; one where it is nearly full already."""
    if 4 * programs >= 3 * units:
        return 1
    return max(1, min(shape.programs * units // programs, tokens // (8 * shape.chunk)))


def sweep(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, offsets: tuple[int, ...], packed: bool,
    scale: float = 1.0, reverse: bool = False, start: Tensor | None = None, end: bool = False,
    strict: bool = False, x: Tensor | None = None, keep: bool = False, meet: Tensor | None = None,
) -> Swept:  # fmt: skip
    """One sweep.

    Args:
        q: [batch, heads, tokens, dk], channels contiguous, as all of them.
        k: of the same shape.
        v: [batch, heads, tokens, dv].
        g: log decays [heads], [batch, heads, tokens] or [batch, heads, tokens, dk], or None.
        offsets: 0, tokens; or those of the packed sequences.
        packed: whether the batch of one is packed.
        scale: factor of out.
        reverse: whether a token sees those behind it instead of those before.
        start: state before the first token of the sweep [sequences, heads, dk, dv] in float32.
        end: whether the state behind the last is wanted.
        strict: whether no token sees itself.
        x: what the rows of out are multiplied with, of out's shape.
        keep: whether states before every segment are wanted.
        meet: those of a sweep in the other direction, to be multiplied with this one's.
    """
    batch, heads, tokens, dk = q.shape
    dv = v.shape[-1]
    decay = 0 if g is None else {1: 1, 3: 2, 4: 3}[g.ndim]
    shape = shape_of(dv, decay > 2)
    columns = triton.cdiv(dv, shape.columns)
    many = wanted(shape, columns * batch * heads, tokens, units(q.device))
    cut = stretches(offsets, packed, many, q.device)
    count = len(cut.first)
    sequences = batch if cut.sequences is None else cut.sequences
    out = q.new_empty(batch, tokens, heads, dv).transpose(1, 2)
    state = torch.empty(sequences, heads, dk, dv, device=q.device) if end else None
    dots = torch.empty(columns, batch, heads, tokens, device=q.device) if x is not None else None
    g_at = (0, 0, 0) if g is None else (0, g.stride(0), 0) if decay == 1 else g.stride()[:3]
    several = count > (1 if cut.sequences is None else cut.sequences)
    added = torch.empty(batch * heads, count, dk, dv, device=q.device) if several else None
    places = (batch * heads, cut.segments)
    kept = q.new_empty(*places, dk, dv) if keep else meet
    meetings = torch.empty(*places, dv, device=q.device) if meet is not None else None
    wide = dk if decay == 3 else 1
    faded = torch.empty(batch * heads, count, wide, device=q.device) if several else None
    for only_states in (True, False) if several else (False,):
        _sweep[columns, count, batch * heads](
            q, k, v, g, x, out, dots, cut.begins, cut.first, cut.last, added, faded, start, state,
            kept, meetings, cut.numbers, heads, tokens, count, scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *g_at, *((0, 0, 0) if x is None else x.stride()[:3]), *out.stride()[:3],
            dk=dk, dv=dv, C=shape.chunk, DK=max(16, triton.next_power_of_2(dk)), BV=shape.columns,
            DECAY=decay, REVERSE=reverse, PACKED=packed, SEVERAL=several, STATES=only_states,
            DOTS=x is not None, START=start is not None, END=end and not only_states,
            KEEP=keep and not only_states, MEET=meet is not None and not only_states,
            EVERY=SEGMENT // shape.chunk, STRICT=strict, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return Swept(out, state, None if dots is None else dots.sum(0), kept, meetings)
