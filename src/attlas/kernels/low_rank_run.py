"""Calls of the kernels for low-rank updates, and their gradients.

With u_t = S_{t−1}ᵀ b_t, x_t its gradient, S the states and D their gradients,

    dq_t = scale · S_t do_t      dk_t = D_t v_t      da_t = D_t u_t      db_t = S_{t−1} x_t
    dg_t = dg_{t+1} + b_{t+1} ⊙ db_{t+1} + q_t ⊙ dq_t − k_t ⊙ dk_t − a_t ⊙ da_t

S is an additive recurrence of k against v and of a against u, D one of q against do and of b against x,
the latter from the token before on: each product is the sum of two sweeps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import units
from attlas.kernels.delta_run import cut
from attlas.kernels.low_rank import _back, _onwards, _squares
from attlas.kernels.recurrence import following, gradient_of_channels, transposed
from attlas.kernels.sweep_run import sweep

#: Tokens of a chunk.
CHUNK = 16


class LowRank(torch.autograd.Function):
    """The recurrence with its gradients."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor,
        start: Tensor | None, scale: float, offsets: tuple[int, ...], packed: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Outputs, and the state behind the last token."""
        call = _Call(q, k, g, a, b, scale, offsets, packed)
        squares = call.squares()
        out, written, end = call.onwards(squares, v, start, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, g, a, b, start, squares, written, end)
        ctx.given = {"scale": scale, "offsets": offsets, "packed": packed}
        return out, end

    @staticmethod
    def backward(ctx, d_out: Tensor, d_end: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        """Gradients of all that `forward` takes."""
        q, k, v, g, a, b, start, squares, u, end = ctx.saved_tensors
        given, offsets = ctx.given, ctx.given["offsets"]
        wants_g, wants_start = ctx.needs_input_grad[3], ctx.needs_input_grad[6]
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        after = None if d_end is None else d_end.float().contiguous()
        call = _Call(q, k, g, a, b, **given)
        x, dv, d_start = call.back(squares, v, d_out, after, wants_start)
        next_x, next_b = (_from_next(each, offsets) for each in (x, b))
        ways = _Ways(g, wants_g, given)
        before, last = (
            transposed(start),
            None if after is None else transposed(after / given["scale"]),
        )
        dq = ways.ahead(d_out, (v, k, before), (u, a, None), scaled=True)
        db = _to_next(ways.ahead(next_x, (v, k, before), (u, a, None)), x, before, offsets)
        dk = ways.behind(v, (d_out, q, last), (next_x, next_b))
        meetings = ways.meetings
        da = ways.behind(u, (d_out, q, last), (next_x, next_b))
        dg = None
        if meetings is not None:
            share = None if d_end is None else (end * d_end).sum(-1)
            met = following(meetings, share, offsets)
            more = torch.empty_like(dq).copy_(_from_next(b * db, offsets) - a * da)
            dq, dk, dg = gradient_of_channels(q, k, dq, dk, g, met, offsets, more)
        to = q.dtype
        return (dq.to(to), dk.to(to), dv, dg, da.to(to), db.to(to), d_start, None, None, None)


class _Ways:
    """Pairs of sweeps that share a decay: over what the state holds, and over what comes to it."""

    def __init__(self, g: Tensor | None, wants: bool, given: dict[str, Any]) -> None:
        self.g, self.wants, self.given = g, wants, given
        self.plain = {**given, "scale": 1.0}
        self.kept: Tensor | None = None
        self.meetings: Tensor | None = None

    def ahead(
        self, q: Tensor, first: tuple[Any, ...], second: tuple[Any, ...], scaled: bool = False
    ) -> Tensor:
        """Σ over earlier tokens; the first time, what a gradient of decays needs is kept."""
        given, keep = self.given if scaled else self.plain, self.wants and self.kept is None
        found = []
        for k, v, start in (first, second):
            swept = sweep(
                q, k, v, self.g, start=start, keep=keep, axis="values", dtype=torch.float32, **given
            )
            found.append(swept.out)
            if keep and swept.kept is not None:
                self.kept = swept.kept if self.kept is None else self.kept.add_(swept.kept)
        return found[0].add_(found[1])

    def behind(self, q: Tensor, first: tuple[Any, ...], second: tuple[Any, ...]) -> Tensor:
        """Σ over later tokens, of which the first source is scaled."""
        meet = self.kept if self.meetings is None else None
        given: dict[str, Any] = {
            "reverse": True, "meet": meet, "axis": "values", "dtype": torch.float32
        }  # fmt: skip
        (k, v, last), (next_k, next_v) = first, second
        one = sweep(q, k, v, self.g, start=last, **self.given, **given)
        two = sweep(q, next_k, next_v, self.g, **self.plain, **given)
        if one.meetings is not None and two.meetings is not None:
            self.meetings = one.meetings * self.given["scale"] + two.meetings
        return one.out.add_(two.out)


class _Call:
    """The kernels of one call, with what all of them take."""

    def __init__(
        self, q: Tensor, k: Tensor, g: Tensor | None, a: Tensor, b: Tensor, scale: float,
        offsets: tuple[int, ...], packed: bool,
    ) -> None:  # fmt: skip
        self.given, self.scale, self.packed, self.offsets = (q, k, a, b, g), scale, packed, offsets
        self.table = torch.tensor(offsets, dtype=torch.int32, device=q.device)
        self.batch, self.heads, self.tokens, self.dk = q.shape
        self.at = [n for x in (q, k, a, b) for n in x.stride()[:3]]
        self.at += (0, 0, 0) if g is None else g.stride()[:3]
        self.sizes = {
            "dk": self.dk, "C": CHUNK, "DK": max(16, triton.next_power_of_2(self.dk)),
            "DECAY": g is not None,
        }  # fmt: skip

    def squares(self) -> Tensor:
        """⟨q, k⟩, ⟨q, a⟩, T and M of all chunks."""
        q = self.given[0]
        assert q is not None
        found = q.new_empty(self.batch, self.heads, self.tokens, 4 * CHUNK)
        longest = max((b - a for a, b in pairwise(self.offsets)), default=0)
        grid = (max(1, triton.cdiv(longest, CHUNK)), len(self.offsets) - 1, self.batch * self.heads)
        _squares[grid](
            *self.given, found, self.table, self.heads, self.tokens, self.scale, *self.at,
            **self.sizes, num_warps=2, num_stages=1,
        )  # fmt: skip
        return found

    def onwards(
        self, squares: Tensor, v: Tensor, start: Tensor | None, wants: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(outputs, u, states behind the sequences)."""
        q, k, a, b, g = self.given
        out, written = self.like(v), self.like(v) if wants else None
        grid, swept, end = self.swept(v)
        _onwards[grid](
            q, k, v, a, b, g, squares, written, out, start, end, self.table, self.heads, self.tokens,
            self.scale, *self.at, *v.stride()[:3], *out.stride()[:3], **swept,
            START=start is not None, WRITTEN=wants, num_warps=4,
        )  # fmt: skip
        return out, written, end

    def back(
        self, squares: Tensor, v: Tensor, d_out: Tensor, d_end: Tensor | None, wants: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, dv, the gradient of the first state)."""
        q, k, a, b, g = self.given
        x, d_v = self.like(v), self.like(v)
        grid, swept, d_start = self.swept(v)
        _back[grid](
            q, k, a, b, g, squares, d_out, x, d_v, d_end, d_start, self.table, self.heads,
            self.tokens, self.scale, *self.at, *d_out.stride()[:3], *x.stride()[:3], **swept,
            END=d_end is not None, START=wants, num_warps=4,
        )  # fmt: skip
        return x, d_v, d_start if wants else None

    def swept(self, v: Tensor) -> tuple[tuple[int, ...], dict[str, Any], Tensor]:
        """The grid, what a sweep is compiled for, and room for the states at its end."""
        rows, dv = self.batch * self.heads, v.shape[-1]
        columns, stages = cut(rows * (len(self.offsets) - 1), dv, units(v.device))
        sequences = len(self.offsets) - 1 if self.packed else self.batch
        state = torch.empty(sequences, self.heads, self.dk, dv, device=v.device)
        sizes = {**self.sizes, "dv": dv, "BV": columns, "PACKED": self.packed, "num_stages": stages}
        return (triton.cdiv(dv, columns), len(self.offsets) - 1, rows), sizes, state

    def like(self, v: Tensor) -> Tensor:
        """Of v's type and shape, tokens before heads in memory, as sweeps make them."""
        return v.new_empty(v.shape[0], v.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)


def _lasts(offsets: tuple[int, ...]) -> list[int]:
    """Last tokens of sequences that have some."""
    return [stop - 1 for start, stop in pairwise(offsets) if stop > start]


def _from_next(x: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """In every token's place what stands at the next one of its sequence; zeros behind the last."""
    moved = torch.empty_like(x)
    moved[:, :, :-1] = x[:, :, 1:]
    moved[:, :, _lasts(offsets)] = 0
    return moved


def _to_next(found: Tensor, x: Tensor, before: Tensor | None, offsets: tuple[int, ...]) -> Tensor:
    """In every token's place what was found at the one before; at the first, what the state gives."""
    moved = torch.empty_like(found)
    moved[:, :, 1:] = found[:, :, :-1]
    for n, (start, stop) in enumerate(pairwise(offsets)):
        if stop > start and before is None:
            moved[:, :, start] = 0
        elif stop > start and before is not None:  # Sᵀ [sequences, heads, dv, dk]
            rows = slice(n, n + 1) if len(offsets) > 2 else slice(None)
            moved[:, :, start] = (x[:, :, start, :, None].float() * before[rows]).sum(-2)
    return moved
