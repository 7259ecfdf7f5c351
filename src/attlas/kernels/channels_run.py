"""Calls of the sweeps that give the gradients of recurrences whose channels decay each by themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.channels import _both
from attlas.kernels.decode import units
from attlas.kernels.sweep_run import SEGMENT, Shape, Stretches, stretches

#: How these sweeps are cut; `columns` are channels.
SHAPE = Shape(chunk=16, columns=64, warps=4, stages=2, programs=4)


class Low(NamedTuple):
    """A low-rank update's share: a and b of q's shape; u and x of v's, and alike in memory."""

    a: Tensor
    b: Tensor
    u: Tensor
    x: Tensor


class Gradients(NamedTuple):
    """Of a recurrence; da and db None without a low-rank update, dg unless wanted."""

    dq: Tensor
    dk: Tensor
    da: Tensor | None
    db: Tensor | None
    dg: Tensor | None


def gradients(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, g: Tensor, low: Low | None = None, *,
    offsets: tuple[int, ...], packed: bool, scale: float, start: Tensor | None = None,
    end: Tensor | None = None, d_end: Tensor | None = None, wants_g: bool = True, strict: bool = False,
) -> Gradients:  # fmt: skip
    """Gradients of q, k, a, b and log decays.

    Args:
        q: [batch, heads, tokens, dk], channels contiguous, as all of them.
        k: of the same shape.
        v: [batch, heads, tokens, dv].
        d_out: gradients of outputs, of v's shape.
        g: log decays, of q's shape.
        low: a low-rank update's share.
        offsets: 0, tokens; or those of the packed sequences.
        packed: whether the batch of one is packed.
        scale: factor of outputs.
        start: states before the first tokens [sequences, heads, dk, dv] in float32, contiguous.
        end: those behind the last, which d_end needs where `wants_g`.
        d_end: their gradients, alike.
        wants_g: whether decays have gradients.
        strict: whether no token sees itself.
    """
    sides = _Sides(q, v, g, offsets, packed, scale, low is not None, wants_g, strict)
    written, asked = (v, k), (d_out, q)
    written_2, asked_2 = ((None, None),) * 2 if low is None else ((low.u, low.a), (low.x, low.b))
    dq, db = sides.sweep(written, written_2, asked, asked_2, start, None, reverse=False)
    share = None
    if wants_g and d_end is not None and end is not None:
        share = (end * d_end).sum(-1)
    dk, da = sides.sweep(asked, asked_2, written, written_2, d_end, share, reverse=True)
    assert dq is not None
    assert dk is not None
    return Gradients(dq, dk, da, db, sides.dg)


class _Sides:
    """The two sweeps, and what the first leaves for the second."""

    def __init__(
        self, q: Tensor, v: Tensor, g: Tensor, offsets: tuple[int, ...], packed: bool, scale: float,
        low: bool, wants: bool, strict: bool,
    ) -> None:  # fmt: skip
        self.q, self.g, self.scale, self.dv = q, g, scale, v.shape[-1]
        self.batch, self.heads, self.tokens, self.dk = q.shape
        self.columns = triton.cdiv(self.dk, SHAPE.columns)
        rows = self.batch * self.heads
        fill = SHAPE.programs * units(q.device) // (self.columns * rows)
        many = max(1, min(fill, self.tokens // (8 * SHAPE.chunk)))
        self.cut: Stretches = stretches(offsets, packed, many, q.device)
        self.count = len(self.cut.first)
        self.several = self.count > (1 if self.cut.sequences is None else self.cut.sequences)
        self.sizes = {
            "dk": self.dk, "dv": self.dv, "C": SHAPE.chunk, "BC": SHAPE.columns, "LOW": low,
            "DV": max(16, triton.next_power_of_2(self.dv)), "STRICT": strict, "PACKED": packed,
            "EVERY": SEGMENT // SHAPE.chunk, "SEVERAL": self.several, "num_warps": SHAPE.warps,
            "num_stages": SHAPE.stages,
        }  # fmt: skip
        self.wants, self.low = wants, low
        self.z = self.like(torch.float32) if wants else None
        self.w = self.like(torch.float32) if wants and low else None
        self.kept = q.new_empty(rows, self.cut.segments, self.dv, self.dk) if wants else None
        self.dg = self.like(g.dtype) if wants else None

    def sweep(
        self, source: tuple[Tensor, Tensor], source_2: tuple[Any, Any], asked: tuple[Tensor, Tensor],
        asked_2: tuple[Any, Any], edge: Tensor | None, share: Tensor | None, reverse: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What is read of the state, by the first and by the second."""
        rows, (u, _), cut = self.batch * self.heads, source_2, self.cut
        out, out_2 = self.like(self.q.dtype), self.like(self.q.dtype) if self.low else None
        added, faded = (
            torch.empty(rows, self.count, *shape, device=self.q.device) if self.several else None
            for shape in ((self.dv, self.dk), (self.dk,))
        )
        at = [
            n
            for x in (*source, *asked, u, source_2[1], asked_2[1], self.g, out)
            for n in ((0, 0, 0) if x is None else x.stride()[:3])
        ]
        for only_states in (True, False) if self.several else (False,):
            _both[self.columns, self.count, rows](
                *source, *source_2, *asked, *asked_2, self.g, out, out_2, self.z, self.w, self.dg,
                cut.begins, cut.first, cut.last, added, faded, edge, share, self.kept, cut.numbers,
                self.heads, self.count, self.scale, *at, **self.sizes, REVERSE=reverse,
                STATES=only_states, EDGE=edge is not None, WANTED=self.wants,
            )  # fmt: skip
        return out, out_2

    def like(self, dtype: torch.dtype) -> Tensor:
        """Of q's shape, tokens before heads in memory."""
        shape = (self.batch, self.tokens, self.heads, self.dk)
        return self.q.new_empty(shape, dtype=dtype).transpose(1, 2)
