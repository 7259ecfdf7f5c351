"""Calls of the delta rule's kernels, and its gradients.

With u_t what token t writes, x_t = ∂/∂u_t, S the states and D their gradients,

    dq_t = scale · S_t do_t        dk_t = D_t u_t − β_t e^{g_t} S_{t−1} x_t
    dv_t = β_t x_t                 dβ_t = x_t·v_t − k_t·(e^{g_t} S_{t−1} x_t)
    dg_t = Σ_{r≥t} q_r·dq_r − v_r·dv_r

of which each product with S or D is an additive sweep. A decay of heads has a sum over pairs instead.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import units
from attlas.kernels.delta import _back, _of_keys, _onwards, _within
from attlas.kernels.head_decay import gradient_of_heads
from attlas.kernels.recurrence import following, gradient_of_decay, transposed
from attlas.kernels.sweep_run import sweep

#: Tokens of a chunk, and of its blocks that are solved together.
CHUNK, BLOCK = 64, 16


class Delta(torch.autograd.Function):
    """The (gated) delta rule with its gradients."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, start: Tensor | None,
        scale: float, offsets: tuple[int, ...], packed: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Outputs, and the state behind the last token."""
        call = _Call(q, k, v, g, beta, scale, offsets, packed)
        near, inverse = call.within()
        out, written, end = call.onwards(near, inverse, start, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, g, beta, start, near, inverse, written, end)
        ctx.given = {"scale": scale, "offsets": offsets, "packed": packed}
        return out, end

    @staticmethod
    def backward(ctx, d_out: Tensor, d_end: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        """Gradients of all that `forward` takes."""
        q, k, v, g, beta, start, near, inverse, u, end = ctx.saved_tensors
        given, scale = ctx.given, ctx.given["scale"]
        plain = {**given, "scale": 1.0}
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        wants_g, wants_start = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        call = _Call(q, k, v, g, beta, **given)
        after = None if d_end is None else d_end.float().contiguous()
        x, dv, dots, d_start = call.back(near, inverse, d_out, after, wants_start)
        before = transposed(start)
        of_tokens = wants_g and g.ndim == 3
        x_q, last = q if of_tokens else None, None if after is None else transposed(after / scale)
        by_q = sweep(d_out, u, k, g, start=before, x=x_q, keep=of_tokens, **given)
        by_x = sweep(x, u, k, g, start=before, **plain)
        # The state's gradient meets no scale on its way, but a sweep's outputs do.
        by_out = sweep(u, d_out, q, g, start=last, reverse=True, meet=by_q.kept, **given)
        by_writing = sweep(u, dv, k, g, reverse=True, meet=by_q.kept, **plain)
        dk, d_beta = call.of_keys(u, x, dots, by_out.out, by_writing.out, by_x.out)
        dg = None
        if by_out.meetings is not None:
            share = None if d_end is None else (end * d_end).sum((-2, -1))
            meetings = by_out.meetings * scale - by_writing.meetings
            met = following(meetings.sum(-1), share, given["offsets"])
            dg = gradient_of_decay(by_q.dots - beta.float() * dots, met, g, given["offsets"])
        elif wants_g:  # S is a recurrence of k against u, read by q into o, and by k as −βx
            of_out = gradient_of_heads(q, k, u, d_out, g, start=start, d_end=after, **given)
            of_writing = gradient_of_heads(k, k, u, dv, g, start=start, **plain)
            dg = (of_out - of_writing).to(g.dtype)
        dq = by_q.out
        return dq, dk, dv, dg, d_beta.to(beta.dtype), d_start, None, None, None


class _Call:
    """The kernels of one call, with what all of them take."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, scale: float,
        offsets: tuple[int, ...], packed: bool,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.g, self.beta, self.scale = q, k, v, g, beta, scale
        self.packed, self.offsets = packed, offsets
        self.table = torch.tensor(offsets, dtype=torch.int32, device=q.device)
        self.batch, self.heads, self.tokens, self.dk = q.shape
        self.dv = v.shape[-1]
        self.rows = self.batch * self.heads
        columns, self.stages = cut(self.rows * (len(offsets) - 1), self.dv, units(q.device))
        self.grid = (triton.cdiv(self.dv, columns), len(offsets) - 1, self.rows)
        g_at = (0, 0, 0) if g is None else (0, g.stride(0), 0) if g.ndim == 1 else g.stride()
        self.at = {
            "qk": (*q.stride()[:3], *k.stride()[:3]), "v": v.stride()[:3], "g": (*g_at, *beta.stride()),
        }  # fmt: skip
        self.sizes = {
            "dk": self.dk, "C": CHUNK, "DK": max(16, triton.next_power_of_2(self.dk)),
            "DECAY": g is not None,
        }  # fmt: skip
        self.swept = {**self.sizes, "dv": self.dv, "BV": columns, "PACKED": packed}

    def within(self) -> tuple[Tensor, Tensor]:
        """P and T of all chunks."""
        pair = self.q.new_empty(2, self.batch, self.heads, self.tokens, CHUNK)
        longest = max((b - a for a, b in pairwise(self.offsets)), default=0)
        _within[max(1, triton.cdiv(longest, CHUNK)), *self.grid[1:]](
            self.q, self.k, self.g, self.beta, *pair, self.table, self.heads, self.tokens, self.scale,
            *self.at["qk"], *self.at["g"], **self.sizes, B=BLOCK, num_warps=4, num_stages=1,
        )  # fmt: skip
        return pair[0], pair[1]

    def onwards(
        self, near: Tensor, inverse: Tensor, start: Tensor | None, wants: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(outputs, what was written, states behind the sequences)."""
        out, written = self.like(self.dv), self.like(self.dv) if wants else None
        sequences = len(self.offsets) - 1 if self.packed else self.batch
        end = torch.empty(sequences, self.heads, self.dk, self.dv, device=self.q.device)
        _onwards[self.grid](
            self.q, self.k, self.v, self.g, self.beta, near, inverse, written, out, start, end,
            self.table, self.heads, self.tokens, self.scale, *self.at["qk"], *self.at["v"],
            *self.at["g"], *out.stride()[:3], **self.swept, START=start is not None, WRITTEN=wants,
            num_warps=4, num_stages=self.stages,
        )  # fmt: skip
        return out, written, end

    def back(
        self, near: Tensor, inverse: Tensor, d_out: Tensor, d_end: Tensor | None, wants: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(x, βx, Σ x ⊙ v, the gradient of the first state)."""
        x, d_v = self.like(self.dv), self.like(self.dv)
        shape = (self.grid[0], self.batch, self.heads, self.tokens)
        dots = torch.empty(shape, device=self.q.device)
        sequences = len(self.offsets) - 1 if self.packed else self.batch
        d_start = torch.empty(sequences, self.heads, self.dk, self.dv, device=self.q.device)
        _back[self.grid](
            self.q, self.k, self.v, self.g, self.beta, near, inverse, d_out, x, d_v, dots, d_end,
            d_start, self.table, self.heads, self.tokens, self.scale, *self.at["qk"], *self.at["v"],
            *self.at["g"], *d_out.stride()[:3], *x.stride()[:3], **self.swept, END=d_end is not None,
            START=wants, num_warps=4, num_stages=self.stages,
        )  # fmt: skip
        return x, d_v, dots.sum(0), d_start if wants else None

    def of_keys(
        self,
        u: Tensor,
        x: Tensor,
        dots: Tensor,
        from_out: Tensor,
        from_writing: Tensor,
        read: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(dk, dβ)."""
        d_k, d_beta = self.like(self.dk), torch.empty_like(dots)
        tokens = 32
        _of_keys[triton.cdiv(self.tokens, tokens), self.rows](
            self.k, u, x, self.beta, dots, from_out, from_writing, read, d_k, d_beta, self.heads,
            self.tokens, *self.k.stride()[:3], *u.stride()[:3], *self.beta.stride(),
            *d_k.stride()[:3], dk=self.dk, dv=self.dv, TOKENS=tokens, DK=self.sizes["DK"],
            DV=triton.next_power_of_2(self.dv), num_warps=4,
        )  # fmt: skip
        return d_k, d_beta

    def like(self, width: int) -> Tensor:
        """Of q's type, tokens before heads in memory, as sweeps make them."""
        shape = (self.batch, self.tokens, self.heads, width)
        return self.q.new_empty(shape).transpose(1, 2)


def cut(rows: int, dv: int, units: int) -> tuple[int, int]:
    """(columns of v that a program takes, stages of its loads), measured on Hopper.

    One stage with so few columns is compiled wrongly by Triton 3.6.
    """
    columns = 16 if rows * triton.cdiv(dv, 16) <= units else 32
    return columns, 3 if rows * triton.cdiv(dv, columns) <= units else 2
