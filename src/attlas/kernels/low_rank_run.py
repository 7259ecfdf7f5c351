"""Calls of the kernels for low-rank updates, and their gradients.

With u_t = S_{t−1}ᵀ b_t and x_t its gradient, what is left are two sweeps: see `attlas.kernels.channels`.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels import channels_run
from attlas.kernels.decode import units
from attlas.kernels.delta_run import cut
from attlas.kernels.low_rank import _back, _onwards, _squares

#: Tokens of a chunk, and warps of a sweep from chunk to chunk.
CHUNK, WARPS = 16, 4


class LowRank(torch.autograd.Function):
    """The recurrence with its gradients."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, a: Tensor, b: Tensor,
        start: Tensor | None, scale: float, offsets: tuple[int, ...], packed: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Outputs, and the state behind the last token."""
        g = q.new_zeros(q.shape[-1]).expand(q.shape) if g is None else g
        call = _Call(v, q.shape[-1], offsets, packed)
        chunks = call.chunks(q, k, a, b, g, scale)
        out, written, end = call.onwards(chunks, v, start, any(ctx.needs_input_grad))
        # The chunks are four times as large as q, and soon found again.
        ctx.save_for_backward(q, k, v, g, a, b, start, written, end)
        ctx.given = {"scale": scale, "offsets": offsets, "packed": packed}
        return out, end

    @staticmethod
    def backward(ctx, d_out: Tensor, d_end: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        """Gradients of all that `forward` takes."""
        q, k, v, g, a, b, start, u, end = ctx.saved_tensors
        given, (wants_g, wants_start) = ctx.given, (ctx.needs_input_grad[n] for n in (3, 6))
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        d_end = None if d_end is None else d_end.float().contiguous()
        call = _Call(v, q.shape[-1], given["offsets"], given["packed"])
        chunks = call.chunks(q, k, a, b, g, given["scale"])
        x, dv, d_start = call.back(chunks, d_out, d_end, wants_start)
        del chunks
        found = channels_run.gradients(
            q, k, v, d_out, g, channels_run.Low(a, b, u, x), start=start, end=end, d_end=d_end,
            wants_g=wants_g, **given,
        )  # fmt: skip
        return (found.dq, found.dk, dv, found.dg, found.da, found.db, d_start, None, None, None)


class Chunks(NamedTuple):
    """What is known of chunks without a state.

    Attributes:
        near: q, b, k and a with decays from or to the middle [rows, tokens, 4, dk].
        squares: ⟨q, k⟩, ⟨q, a⟩, T and M [rows, tokens, 4, chunk].
        marks: what a state keeps up to the middle, and from there on [rows, chunks, 2, dk].
    """

    near: Tensor
    squares: Tensor
    marks: Tensor


class _Call:
    """The kernels of one call, with what all of them take."""

    def __init__(self, v: Tensor, dk: int, offsets: tuple[int, ...], packed: bool) -> None:
        self.batch, self.heads, self.tokens, self.dv = v.shape
        self.dk, self.packed, self.offsets, self.rows = dk, packed, offsets, v.shape[0] * v.shape[1]
        self.counts = [triton.cdiv(stop - start, CHUNK) for start, stop in pairwise(offsets)]
        # Where sequences begin: their tokens, and their chunks among all.
        table = [*offsets, *accumulate(self.counts, initial=0)]
        self.table = torch.tensor(table, dtype=torch.int32, device=v.device)
        self.places = (self.table, self.heads, self.tokens, sum(self.counts))
        self.sizes = {"dk": dk, "C": CHUNK, "DK": max(16, triton.next_power_of_2(dk))}

    def chunks(self, q: Tensor, k: Tensor, a: Tensor, b: Tensor, g: Tensor, scale: float) -> Chunks:
        """All of them at once."""
        given = (q, k, a, b, g)
        near = q.new_empty(self.rows, self.tokens, 4, self.dk)
        squares = q.new_empty(self.rows, self.tokens, 4, CHUNK)
        marks = torch.empty(self.rows, sum(self.counts), 2, self.dk, device=q.device)
        _squares[max(1, *self.counts), len(self.counts), self.rows](
            *given, near, squares, marks, *self.places, scale,
            *(n for x in given for n in x.stride()[:3]), **self.sizes, num_warps=2, num_stages=1,
        )  # fmt: skip
        return Chunks(near, squares, marks)

    def onwards(
        self, chunks: Chunks, v: Tensor, start: Tensor | None, wants: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(outputs, u, states behind the sequences)."""
        out, written = self.like(v), self.like(v) if wants else None
        grid, swept, end = self.swept(v)
        _onwards[grid](
            v, *chunks, written, out, start, end, *self.places, *v.stride()[:3], *out.stride()[:3],
            **swept, START=start is not None, WRITTEN=wants,
        )  # fmt: skip
        return out, written, end

    def back(
        self, chunks: Chunks, d_out: Tensor, d_end: Tensor | None, wants: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, dv, the gradient of the first state)."""
        x, d_v = self.like(d_out), self.like(d_out)
        grid, swept, d_start = self.swept(d_out)
        _back[grid](
            *chunks, d_out, x, d_v, d_end, d_start, *self.places, *d_out.stride()[:3],
            *x.stride()[:3], **swept, END=d_end is not None, START=wants,
        )  # fmt: skip
        return x, d_v, d_start if wants else None

    def swept(self, v: Tensor) -> tuple[tuple[int, ...], dict[str, Any], Tensor]:
        """The grid, what a sweep is compiled for, and room for the states at its end."""
        sequences = len(self.counts)
        columns, stages = cut(self.rows * sequences, self.dv, units(v.device))
        shape = (sequences if self.packed else self.batch, self.heads, self.dk, self.dv)
        state = torch.empty(shape, device=v.device)
        sizes = {**self.sizes, "dv": self.dv, "BV": columns, "PACKED": self.packed}
        sizes |= {"num_stages": stages, "num_warps": WARPS}
        return (triton.cdiv(self.dv, columns), sequences, self.rows), sizes, state

    def like(self, v: Tensor) -> Tensor:
        """Of v's type and shape, tokens before heads in memory, as sweeps make them."""
        return v.new_empty(v.shape[0], v.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)
