"""Linear recurrences on a GPU, with their gradients: a sweep forwards, and three backwards.

    dq: k, v exchanged, do for q           dk: reverse, of v, do, q           dv: reverse, of k, q, do

The gradient of a decay's sum is dG_t = q_t·dq_t − k_t·dk_t (channel by channel, where they have decays of
their own), and that of the decay a sum of those over all later tokens.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from itertools import pairwise
from typing import Any, no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.sweep import LEAST, LEAST_OF_CHANNEL, LOG2E, sweep


class Scan(torch.autograd.Function):
    """The recurrence with its gradients."""

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
        of_channels = wants_g and g.ndim == 4
        x_q, x_k = (q, k) if wants_g and not of_channels else (None, None)
        wide = torch.float32 if of_channels else None
        # The state's gradient meets no scale on its way, but a sweep's outputs do.
        after = None if d_end is None else (d_end.float() / scale).contiguous()
        dq, _, dots_q = sweep(
            d_out, v, k, g, start=turned(start), x=x_q, axis="values", dtype=wide, **given
        )
        dk, _, dots_k = sweep(
            v, d_out, q, g, start=turned(after), reverse=True, x=x_k, axis="values", dtype=wide, **given
        )
        dv, d_start, _ = sweep(k, q, d_out, g, start=after, reverse=True, end=wants_start, **given)
        dg = None
        if of_channels:
            dq, dk, dg = gradient_of_channels(q, k, dq, dk, g, end, d_end, given["offsets"])
        elif dots_q is not None and dots_k is not None:
            dg = gradient_of_decay(dots_q - dots_k, end, d_end, g, given["offsets"])
        return dq, dk, dv, dg, None if d_start is None else d_start * scale, None, None, None


def gradient_of_decay(
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
    return (each * (g > LEAST / LOG2E)).to(g.dtype)


#: Tokens and channels that a program of `_later` takes at a time.
_TOKENS, _CHANNELS = 64, 32


@triton.jit(do_not_specialize=["heads"])
@no_type_check
def _later(
    q, k, dq, dk, g, share, out_q, out_k, out_g, offsets, heads, least,
    q_b, q_h, q_t, k_b, k_h, k_t, g_b, g_h, g_t, o_b, o_h, o_t,
    dim: tl.constexpr, SHARE: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Σ q ⊙ dq − k ⊙ dk over all later tokens, with dq and dk themselves in the type of outputs."""
    sequence = tl.program_id(1)
    row, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin, stop = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    far, up = row.to(tl.int64), head.to(tl.int64)
    if SHARE:
        at = ((sequence if PACKED else row) * heads + head) * dim
        total = tl.load(share + at + c, mask=c < dim, other=0.0)
    else:
        total = tl.zeros((CHANNELS,), tl.float32)
    steps = tl.cdiv(stop - begin, TOKENS)
    for n in range(steps):
        t = begin + (steps - 1 - n) * TOKENS + tl.arange(0, TOKENS)
        long = t.to(tl.int64)[:, None]
        live = (t < stop)[:, None] & (c < dim)[None, :]
        o_at = far * o_b + up * o_h + long * o_t + c[None, :]
        query = tl.load(q + far * q_b + up * q_h + long * q_t + c[None, :], mask=live, other=0.0)
        key = tl.load(k + far * k_b + up * k_h + long * k_t + c[None, :], mask=live, other=0.0)
        d_query = tl.load(dq + o_at, mask=live, other=0.0)
        d_key = tl.load(dk + o_at, mask=live, other=0.0)
        each = query.to(tl.float32) * d_query - key.to(tl.float32) * d_key
        summed = tl.cumsum(each, axis=0, reverse=True) + total[None, :]
        total += tl.sum(each, axis=0)
        rate = tl.load(g + far * g_b + up * g_h + long * g_t + c[None, :], mask=live, other=0.0)
        summed = tl.where(rate.to(tl.float32) > least, summed, 0.0)
        tl.store(out_q + o_at, d_query.to(out_q.dtype.element_ty), mask=live)
        tl.store(out_k + o_at, d_key.to(out_k.dtype.element_ty), mask=live)
        tl.store(out_g + o_at, summed.to(out_g.dtype.element_ty), mask=live)


def gradient_of_channels(
    q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, g: Tensor, end: Tensor, d_end: Tensor | None,
    offsets: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk in the type of q, the gradient of log decays [batch, heads, tokens, dim])."""
    batch, heads, tokens, dim = q.shape
    share = None if d_end is None else (end * d_end).sum(-1).contiguous()
    outs = [
        torch.empty(batch, tokens, heads, dim, dtype=x.dtype, device=q.device).transpose(1, 2)
        for x in (q, k, g)
    ]
    table = torch.tensor(offsets, dtype=torch.int32, device=q.device)
    _later[triton.cdiv(dim, _CHANNELS), len(offsets) - 1, batch * heads](
        q, k, dq, dk, g, share, *outs, table, heads, LEAST_OF_CHANNEL / LOG2E,
        *q.stride()[:3], *k.stride()[:3], *g.stride()[:3], *dq.stride()[:3], dim=dim,
        SHARE=share is not None, PACKED=len(offsets) > 2, TOKENS=_TOKENS, CHANNELS=_CHANNELS,
        num_warps=4,
    )  # fmt: skip
    return outs[0], outs[1], outs[2]


def turned(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.mT.contiguous()
