"""Linear recurrences on a GPU, with their gradients: a sweep forwards, and three backwards.

    dq: k, v exchanged, do for q           dk: reverse, of v, do, q           dv: reverse, of k, q, do

The gradient of a decay's sum is dG_t = q_t·dq_t − k_t·dk_t (channel by channel, where they have decays of
their own), and that of the decay a sum of those over all later tokens: of a segment's end only, with
Σ S ⊙ ∂S at the next segment's first token, where the sweeps of dq and dk meet. Were it summed over
everything, what the two round differently would add up.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.sweep import LEAST, LEAST_OF_CHANNEL, LOG2E
from attlas.kernels.sweep_run import SEGMENT, sweep
from attlas.tracing import kept


class Scan(torch.autograd.Function):
    """The recurrence with its gradients."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None, scale: float,
        offsets: tuple[int, ...], packed: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Outputs, and the state behind the last token."""
        given: dict[str, Any] = {"offsets": offsets, "packed": packed, "scale": scale}
        found = sweep(q, k, v, g, start=start, end=True, **given)
        ctx.save_for_backward(q, k, v, g, start, found.state)
        ctx.given = given
        assert found.state is not None
        return found.out, found.state

    @staticmethod
    def backward(ctx, d_out: Tensor, d_end: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        """Gradients of all that `forward` takes."""
        q, k, v, g, start, end = ctx.saved_tensors
        given, scale = ctx.given, ctx.given["scale"]
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        wants_g, wants_start = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        of_channels = wants_g and g.ndim == 4
        x_q, x_k = (q, k) if wants_g and not of_channels else (None, None)
        wide = torch.float32 if of_channels else None
        # The state's gradient meets no scale on its way, but a sweep's outputs do.
        after = None if d_end is None else (d_end.float() / scale).contiguous()
        by_q = sweep(
            d_out,
            v,
            k,
            g,
            start=transposed(start),
            x=x_q,
            keep=wants_g,
            axis="values",
            dtype=wide,
            **given,
        )
        by_k = sweep(
            v, d_out, q, g, start=transposed(after), reverse=True, x=x_k, meet=by_q.kept, axis="values",
            dtype=wide, **given,
        )  # fmt: skip
        by_v = sweep(k, q, d_out, g, start=after, reverse=True, end=wants_start, **given)
        dq, dk, dg = by_q.out, by_k.out, None
        if by_k.meetings is not None:
            share = None if d_end is None else (end * d_end).sum(-1)
            met = following(by_k.meetings * scale, share, given["offsets"])
            if of_channels:
                dq, dk, dg = gradient_of_channels(q, k, dq, dk, g, met, given["offsets"])
            else:
                of_sums = by_q.dots - by_k.dots  # type: ignore[operator]
                dg = gradient_of_decay(of_sums, met.sum(-1), g, given["offsets"])
        d_start = None if by_v.state is None else by_v.state * scale
        return dq, dk, by_v.out, dg, d_start, None, None, None


@dataclass(frozen=True)
class Segments:
    """The segments of all sequences, one after the other.

    Attributes:
        begins: their first tokens.
        stops: the tokens behind their last.
        after: of each, the number of the next in its sequence; behind the last segments of sequences
            come the sequences themselves.
        own: of each token, its segment's number.
    """

    begins: Tensor
    stops: Tensor
    after: Tensor
    own: Tensor


@kept(64)
def segments(offsets: tuple[int, ...], device: torch.device) -> Segments:
    """Of sequences between these offsets."""
    begins: list[int] = []
    stops: list[int] = []
    after: list[int] = []
    total = sum(-(-(stop - start) // SEGMENT) for start, stop in pairwise(offsets))
    for n, (start, stop) in enumerate(pairwise(offsets)):
        own = list(range(start, stop, SEGMENT))
        after += [len(begins) + i + 1 for i in range(len(own))]
        if own:
            after[-1] = total + n
        begins += own
        stops += [min(stop, begin + SEGMENT) for begin in own]
    found = [torch.tensor(x, dtype=torch.int32, device=device) for x in (begins, stops, after)]
    lengths = (found[1] - found[0]).long()
    own_number = torch.arange(total, device=device).repeat_interleave(lengths)
    return Segments(found[0], found[1], found[2], own_number)


def following(meetings: Tensor, share: Tensor | None, offsets: tuple[int, ...]) -> Tensor:
    """The gradient of a log decay at the first token behind every segment [rows, segments, dim].

    Args:
        meetings: Σ S ⊙ ∂S at the first tokens of segments [rows, segments, dim].
        share: the same behind the sequences [sequences, heads, dim]; None where it is 0.
        offsets: of the sequences.
    """
    rows, _, dim = meetings.shape
    ends = len(offsets) - 1
    if share is None:
        last = meetings.new_zeros(rows, ends, dim)
    else:
        last = share.transpose(0, 1) if ends > 1 else share.reshape(rows, 1, dim)
    return torch.cat((meetings, last), dim=1)[:, segments(offsets, meetings.device).after]


def gradient_of_decay(of_sums: Tensor, met: Tensor, g: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """The gradient of every log decay from that of their sums G.

    Args:
        of_sums: q·dq − k·dk [batch, heads, tokens].
        met: what `following` gives, summed over channels [batch · heads, segments].
        g: log decays as `sweep` takes them.
        offsets: of the sequences.
    """
    cut = segments(offsets, of_sums.device)
    behind = of_sums.double().flip(-1).cumsum(-1).flip(-1)
    behind = torch.cat((behind, behind.new_zeros(*behind.shape[:-1], 1)), dim=-1)
    each = behind[..., :-1] - behind[..., cut.stops[cut.own]]
    each = each + met.view(*of_sums.shape[:2], -1)[..., cut.own]
    if g.ndim == 1:
        each = each.sum((0, 2))
    return (each * (g > LEAST / LOG2E)).to(g.dtype)


#: Channels that a program of `_later` takes.
_CHANNELS = 32


@triton.jit(do_not_specialize=["heads", "count"])
@no_type_check
def _later(
    q, k, dq, dk, g, more, met, out_q, out_k, out_g, begins, stops, heads, count, least,
    q_b, q_h, q_t, k_b, k_h, k_t, g_b, g_h, g_t, o_b, o_h, o_t,
    dim: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Σ q ⊙ dq − k ⊙ dk (+ more) to a segment's end, with dq and dk themselves in the type of outputs."""
    segment = tl.program_id(1)
    far, up = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.load(begins + segment) + tl.arange(0, TOKENS)
    long = t.to(tl.int64)[:, None]
    live = (t < tl.load(stops + segment))[:, None] & (c < dim)[None, :]
    o_at = far * o_b + up * o_h + long * o_t + c[None, :]
    query = tl.load(q + far * q_b + up * q_h + long * q_t + c[None, :], mask=live, other=0.0)
    key = tl.load(k + far * k_b + up * k_h + long * k_t + c[None, :], mask=live, other=0.0)
    d_query = tl.load(dq + o_at, mask=live, other=0.0)
    d_key = tl.load(dk + o_at, mask=live, other=0.0)
    each = query.to(tl.float32) * d_query - key.to(tl.float32) * d_key
    if MORE:
        each += tl.load(more + o_at, mask=live, other=0.0)
    row = tl.program_id(2).to(tl.int64) * count + segment
    later = tl.load(met + row * dim + c, mask=c < dim, other=0.0)
    summed = tl.cumsum(each, axis=0, reverse=True) + later[None, :]
    rate = tl.load(g + far * g_b + up * g_h + long * g_t + c[None, :], mask=live, other=0.0)
    summed = tl.where(rate.to(tl.float32) > least, summed, 0.0)
    tl.store(out_q + o_at, d_query.to(out_q.dtype.element_ty), mask=live)
    tl.store(out_k + o_at, d_key.to(out_k.dtype.element_ty), mask=live)
    tl.store(out_g + o_at, summed.to(out_g.dtype.element_ty), mask=live)


def gradient_of_channels(
    q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, g: Tensor, met: Tensor, offsets: tuple[int, ...],
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk in the type of q, the gradient of log decays [batch, heads, tokens, dim]).

    Args:
        q: queries, and k keys; dq and dk their gradients in float32, alike in memory.
        k: see q.
        dq: see q.
        dk: see q.
        g: log decays.
        met: what `following` gives.
        offsets: of the sequences.
        more: added to q ⊙ dq − k ⊙ dk, alike in memory with dq.
    """
    batch, heads, tokens, dim = q.shape
    outs = [
        torch.empty(batch, tokens, heads, dim, dtype=x.dtype, device=q.device).transpose(1, 2)
        for x in (q, k, g)
    ]
    cut, count = segments(offsets, q.device), met.shape[1]
    _later[triton.cdiv(dim, _CHANNELS), count, batch * heads](
        q, k, dq, dk, g, more, met, *outs, cut.begins, cut.stops, heads, count, LEAST_OF_CHANNEL / LOG2E,
        *q.stride()[:3], *k.stride()[:3], *g.stride()[:3], *dq.stride()[:3], dim=dim,
        TOKENS=SEGMENT, CHANNELS=_CHANNELS, MORE=more is not None, num_warps=4,
    )  # fmt: skip
    return outs[0], outs[1], outs[2]


def transposed(state: Tensor | None) -> Tensor | None:
    """Keys and values exchanged."""
    return None if state is None else state.mT.contiguous()
