"""Linear recurrences on a GPU, with their gradients: a sweep forwards, and three backwards.

    dq: k, v exchanged, do for q           dk: reverse, of v, do, q           dv: reverse, of k, q, do

The gradient of a decay's sum is dG_t = q_t·dq_t − k_t·dk_t, and that of a token's decay a sum of those
over all later tokens: to a segment's end only, with Σ S ⊙ ∂S at the next segment's first token, where the
sweeps of dq and dk meet. Were it summed over everything, what the two round differently would add up.
Decays of heads and of channels have kernels of their own: `head_decay`, `channels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attlas.kernels import channels_run
from attlas.kernels.head_decay import gradient_of_heads
from attlas.kernels.sweep import LEAST, LOG2E
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
        d_end = None if d_end is None else d_end.float().contiguous()
        dq, dk, dg = of_pairs(
            q, k, v, d_out, g, wants_g, start=start, end=end, d_end=d_end, **given
        )
        # The state's gradient meets no scale on its way, but a sweep's outputs do.
        after = None if d_end is None else d_end / scale
        by_v = sweep(k, q, d_out, g, start=after, reverse=True, end=wants_start, **given)
        d_start = None if by_v.state is None else by_v.state * scale
        return dq, dk, by_v.out, dg, d_start, None, None, None


class Behind(torch.autograd.Function):
    """What tokens see of those behind them: o_t = scale · Σ_{s>t} Σ_d q_td k_sd e^{G_sd − G_td} v_s.

    With q and k, and v and ∂o, exchanged, its pairs of tokens are those of a recurrence forwards, and its
    gradients that one's.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, offsets: tuple[int, ...],
        packed: bool,
    ) -> Tensor:  # fmt: skip
        """Outputs."""
        given: dict[str, Any] = {"offsets": offsets, "packed": packed, "scale": scale}
        ctx.save_for_backward(q, k, v, g)
        ctx.given = given
        return sweep(q, k, v, g, reverse=True, strict=True, **given).out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        """Gradients of all that `forward` takes."""
        q, k, v, g = ctx.saved_tensors
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        wants_g = ctx.needs_input_grad[3]
        dk, dq, dg = of_pairs(k, q, d_out, v, g, wants_g, strict=True, **ctx.given)
        dv = sweep(k, q, d_out, g, strict=True, **ctx.given).out
        return dq, dk, dv, dg, None, None, None


def of_pairs(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, g: Tensor | None, wants_g: bool, *,
    offsets: tuple[int, ...], packed: bool, scale: float, start: Tensor | None = None,
    end: Tensor | None = None, d_end: Tensor | None = None, strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k and log decays of an additive recurrence, its states at both ends included."""
    given: dict[str, Any] = {"offsets": offsets, "packed": packed, "scale": scale}
    if g is not None and g.ndim == 4:
        found = channels_run.gradients(
            q, k, v, d_out, g, start=start, end=end, d_end=d_end, wants_g=wants_g, strict=strict,
            **given,
        )  # fmt: skip
        return found.dq, found.dk, found.dg
    last = None if d_end is None else transposed(d_end / scale)
    of_tokens = g is not None and g.ndim == 3 and wants_g
    x_q, x_k = (q, k) if of_tokens else (None, None)
    given["strict"] = strict
    by_q = sweep(d_out, v, k, g, start=transposed(start), x=x_q, keep=of_tokens, **given)
    by_k = sweep(v, d_out, q, g, start=last, reverse=True, x=x_k, meet=by_q.kept, **given)
    dg = None
    if g is not None and of_tokens:
        share = None if d_end is None or end is None else (end * d_end).sum((-2, -1))
        met = following(by_k.meetings.sum(-1) * scale, share, offsets)  # type: ignore[union-attr]
        dg = gradient_of_decay(by_q.dots - by_k.dots, met, g, offsets)  # type: ignore[operator]
    elif g is not None and wants_g:
        del given["strict"]  # a token's pair with itself does not decay
        dg = gradient_of_heads(q, k, v, d_out, g, start=start, d_end=d_end, **given).to(g.dtype)
    return by_q.out, by_k.out, dg


@dataclass(frozen=True)
class Segments:
    """The segments of all sequences, one after the other.

    Attributes:
        stops: the tokens behind their last.
        after: of each, the number of the next in its sequence; behind the last segments of sequences
            come the sequences themselves.
        own: of each token, its segment's number.
    """

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
    lengths = [stop - begin for begin, stop in zip(begins, stops, strict=True)]
    table = [torch.tensor(x, dtype=torch.int32, device=device) for x in (stops, after, lengths)]
    own_number = torch.arange(total, device=device).repeat_interleave(table[2])
    return Segments(table[0], table[1], own_number)


def following(meetings: Tensor, share: Tensor | None, offsets: tuple[int, ...]) -> Tensor:
    """The gradient of a log decay at the first token behind every segment [rows, segments].

    Args:
        meetings: Σ S ⊙ ∂S at the first tokens of segments [rows, segments].
        share: the same behind the sequences [sequences, heads]; None where it is 0.
        offsets: of the sequences.
    """
    rows, ends = meetings.shape[0], len(offsets) - 1
    if share is None:
        last = meetings.new_zeros(rows, ends)
    else:
        last = share.mT if ends > 1 else share.reshape(rows, 1)
    return torch.cat((meetings, last), dim=1)[:, segments(offsets, meetings.device).after]


def gradient_of_decay(of_sums: Tensor, met: Tensor, g: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """The gradient of every token's log decay from that of their sums G.

    Args:
        of_sums: q·dq − k·dk [batch, heads, tokens].
        met: what `following` gives [batch · heads, segments].
        g: log decays, of the shape of of_sums.
        offsets: of the sequences.
    """
    cut = segments(offsets, of_sums.device)
    behind = of_sums.double().flip(-1).cumsum(-1).flip(-1)
    behind = torch.cat((behind, behind.new_zeros(*behind.shape[:-1], 1)), dim=-1)
    each = behind[..., :-1] - behind[..., cut.stops[cut.own]]
    each = each + met.view(*of_sums.shape[:2], -1)[..., cut.own]
    return (each * (g > LEAST / LOG2E)).to(g.dtype)


def transposed(state: Tensor | None) -> Tensor | None:
    """Keys and values exchanged."""
    return None if state is None else state.mT.contiguous()
