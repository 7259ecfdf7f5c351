"""Calls of the kernels for lookahead keys: how they are cut for a device, and what they fill.

Queries are taken in waves, because what the tiles of keys contribute to each query is held until it is
merged: as many numbers as a wave has pairs of a query and a tile, times the width. So memory is linear
in the keys. A backward pass starts from U behind the last query and takes off what each block added;
forwards U is kept at `ANCHORS` waves' ends, so that what is rounded then does not add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.lookahead import forward, merged, nears
from attlas.kernels.lookahead_back import backward, summed

#: What the plain blocks make of q, k, v, q̃, k̃, ṽ and U: outputs, and U behind them.
Plain = Callable[..., tuple[Tensor, Tensor]]
#: Queries of a wave at least, where there are as many, and pairs of a query and a key up to which there
#: are more of them; and of the longest block.
WAVE, PAIRS, BLOCK = 1024, 2**22, 128
#: At how many waves' ends U is kept for a backward pass, but for the last.
ANCHORS = 4
#: Queries that one program merges.
ROWS = 16


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: queries of a block, keys of a tile, warps, stages of the loads."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def fixed(self) -> dict[str, int]:
        """What a kernel is compiled for."""
        return {
            "QUERIES": self.queries, "KEYS": self.keys, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


#: By the bytes of a number and the room for a head's channels. Tensor cores of Hopper take rows in
#: sixteens for each warp, so that more than 4 of them would repeat each other's work on 64.
FORWARD = {
    (2, 64): Tiles(64, 64, 4, 2), (2, 128): Tiles(64, 64, 4, 1), (4, 64): Tiles(32, 32, 4, 1),
}  # fmt: skip
BACKWARD = {
    (2, 64): Tiles(64, 64, 4, 1), (2, 128): Tiles(64, 64, 4, 1), (4, 64): Tiles(32, 32, 4, 1),
}  # fmt: skip


class Lookahead(torch.autograd.Function):
    """Attention to lookahead keys with its gradients."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, asking: Tensor, k_new: Tensor, v_new: Tensor,
        u: Tensor, valid: Tensor | None, scale: float, window: int | None, plain: Plain,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Outputs, and U behind the last query."""
        call = _Call((q, k, v, asking, k_new, v_new), valid, scale, window)
        out, lse, anchors = call.forward(u, any(ctx.needs_input_grad))
        end = anchors[q.shape[2]]
        ctx.save_for_backward(q, k, v, asking, k_new, v_new, u, valid, out, lse, *anchors.values())
        ctx.given = (scale, window, plain, tuple(anchors))
        ctx.set_materialize_grads(False)
        return out, end.to(u.dtype)

    @staticmethod
    def backward(ctx, d_out: Tensor | None, d_end: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        """Gradients of all that `forward` takes."""
        *given, u, valid, out, lse = ctx.saved_tensors[:10]
        scale, window, plain, ends = ctx.given
        wanted = ctx.needs_input_grad[:7]
        if torch.is_grad_enabled():  # the gradients will themselves be differentiated
            return _differentiable(plain, (*given, u), wanted, (d_out, d_end))
        anchors = dict(zip(ends, ctx.saved_tensors[10:], strict=True))
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        found = _Call(tuple(given), valid, scale, window).backward(out, lse, anchors, d_out, d_end)
        each = (x.to(t.dtype) if wants else None
                for x, t, wants in zip(found, (*given, u), wanted, strict=True))  # fmt: skip
        return *each, None, None, None, None


def _differentiable(
    plain: Plain, given: tuple[Tensor, ...], wanted: tuple[bool, ...],
    grads: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients as functions of all that they depend on, by the plain blocks."""
    told = [(x, d) for x, d in zip(plain(*given), grads, strict=True) if d is not None]
    inputs = [x for x, wants in zip(given, wanted, strict=True) if wants]
    outputs, above = zip(*told, strict=True)
    each = iter(torch.autograd.grad(outputs, inputs, above, create_graph=True, allow_unused=True))
    return *(next(each) if wants else None for wants in wanted), None, None, None, None


class _Call:
    """The kernels of one call, with what all of them take."""

    def __init__(
        self, tensors: tuple[Tensor, ...], valid: Tensor | None, scale: float, window: int | None
    ) -> None:
        self.tensors, self.valid = tensors, valid
        q, k = self.q, self.k = tensors[:2]
        self.batch, self.heads, self.queries, self.dim = q.shape
        self.kv_heads, self.keys = k.shape[1:3]
        self.group, self.seen = self.heads // self.kv_heads, self.keys - self.queries
        self.room = max(16, triton.next_power_of_2(self.dim))
        self.rows = wave(self.queries, self.keys)
        self.counts = (self.heads, self.group, self.keys, self.queries, self.seen)
        self.last = (window or 0, scale, self.rows)
        self.at = [n for x in tensors for n in x.stride()[:3]]
        self.at.append(0 if valid is None else valid.stride(0))
        self.kind = (q.element_size(), max(64, self.room))
        self.sizes = {"D": self.dim, "ROOM": self.room}
        self.fixed = {
            **self.sizes, "WINDOW": window is not None, "PADDED": valid is not None,
            "FAST": q.is_cuda and q.element_size() == 2, "ONCE": q.element_size() == 4,
            "PRECISION": "tf32x3" if q.element_size() == 4 else "ieee",
        }  # fmt: skip

    def forward(self, u: Tensor, keeps: bool) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """(outputs, log₂-sum-exp₂ of each query, U behind waves by the number of their last query)."""
        cut, heads = FORWARD[self.kind], self.batch * self.heads
        out = self.like(self.heads, self.queries)
        lse = self.wide(self.batch, self.heads, self.queries)
        parts, lses = (
            self.parts(1, cut),
            self.wide(heads * self.tiles(self.queries, cut) * self.rows),
        )
        near = self.near(cut.queries)
        u, anchors = u.float().contiguous(), {}
        every = self.rows * triton.cdiv(self.queries, self.rows * ANCHORS)
        for begin, end in self.waves():
            tiles = self.tiles(end, cut)
            after = self.wide(self.batch, self.kv_heads, self.seen + end, self.dim)
            forward[tiles, heads](
                *self.tensors, u, after, self.valid, near, parts, lses, *self.counts, begin, end,
                *self.last, *self.at, **self.fixed, **cut.fixed,
            )  # fmt: skip
            merged[triton.cdiv(end - begin, ROWS), heads](
                parts, lses, out, lse, self.heads, tiles, self.seen, begin, end, self.queries,
                self.rows, *out.stride()[:3], **self.sizes, KEYS=cut.keys, ROWS=ROWS,
            )  # fmt: skip
            u = after
            if end == self.queries or (keeps and end % every == 0):
                anchors[end] = u
        return out, lse, anchors

    def backward(
        self,
        out: Tensor,
        lse: Tensor,
        anchors: dict[int, Tensor],
        d_out: Tensor,
        d_end: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k, v, q̃, k̃, ṽ and of U before the first query."""
        cut, heads = BACKWARD[self.kind], self.batch * self.heads
        dots = (d_out.float() * out).sum(-1)
        d_q = self.like(self.heads, self.queries)
        d_new = [self.like(self.kv_heads, self.queries) for _ in range(2)]
        sums = self.wide(4, self.batch, self.kv_heads, self.group, self.keys, self.dim).zero_()
        if d_end is not None:
            sums[0, :, :, 0] = d_end
        parts, near, u = self.parts(3, cut), self.near(cut.queries), anchors[self.queries]
        met = self.q.new_empty(heads * self.tiles(self.queries, cut) * self.rows * cut.keys)
        for begin, end in reversed(self.waves()):
            tiles = self.tiles(end, cut)
            u = anchors.get(end, u)
            before = self.wide(self.batch, self.kv_heads, self.seen + begin, self.dim)
            backward[tiles, heads](
                *self.tensors, u, before, self.valid, near, d_out, lse, dots, sums, parts, met,
                *self.counts, begin, end, *self.last, *self.at, *d_out.stride()[:3], **self.fixed,
                **cut.fixed,
            )  # fmt: skip
            summed[triton.cdiv(end - begin, ROWS), heads, 3](
                parts, d_q, *d_new, self.heads, self.group, tiles, self.seen, begin, end, self.rows,
                *d_q.stride()[:3], *d_new[0].stride()[:3], **self.sizes, KEYS=cut.keys, ROWS=ROWS,
            )  # fmt: skip
            u = before
        d_u, d_k, d_v, d_asking = sums.squeeze(3) if self.group == 1 else sums.sum(3)
        return d_q, d_k, d_v, d_asking, *d_new, d_u[:, :, : self.seen]

    def near(self, block: int) -> Tensor:
        """tril(q ṽᵀ) of every block of queries."""
        blocks, heads = triton.cdiv(self.queries, block), self.batch * self.heads
        found = self.q.new_empty(heads, blocks, block, block)
        q, v_new = self.q, self.tensors[5]
        nears[blocks, heads](
            q, v_new, found, self.heads, self.group, self.queries, *q.stride()[:3],
            *v_new.stride()[:3], **self.sizes, QUERIES=block, PRECISION=self.fixed["PRECISION"],
        )  # fmt: skip
        return found

    def waves(self) -> list[tuple[int, int]]:
        """Begins and ends, in queries."""
        return [
            (begin, min(begin + self.rows, self.queries))
            for begin in range(0, self.queries, self.rows)
        ]

    def tiles(self, end: int, cut: Tiles) -> int:
        """Tiles of keys that the queries before `end` may see."""
        return int(triton.cdiv(self.seen + end, cut.keys))

    def parts(self, kinds: int, cut: Tiles) -> Tensor:
        """Room for what all tiles contribute to a wave."""
        tiles = self.tiles(self.queries, cut)
        return self.q.new_empty(kinds * self.batch * self.heads * tiles * self.rows * self.dim)

    def like(self, heads: int, tokens: int) -> Tensor:
        """Of q's type, tokens before heads in memory, as a layer joins heads."""
        return self.q.new_empty(self.batch, tokens, heads, self.dim).transpose(1, 2)

    def wide(self, *shape: int) -> Tensor:
        """Sums in float32."""
        return self.q.new_empty(shape, dtype=torch.float32)


def wave(queries: int, keys: int) -> int:
    """Queries of a wave: a power of two of blocks, so that each block lies in one."""
    most = max(WAVE, 2 ** ((PAIRS // keys).bit_length() - 1) if keys <= PAIRS else 0)
    return int(min(most, max(BLOCK, triton.next_power_of_2(queries))))
