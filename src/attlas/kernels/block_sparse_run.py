"""Calls of the kernels for listed blocks: how they are cut, lists turned round, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor
from triton.tools.tensor_descriptor import (  # type: ignore[import-untyped, unused-ignore]
    TensorDescriptor,
)

from attlas.kernels.block_sparse import LOG2E, forward
from attlas.kernels.block_sparse_back import backward_keys, backward_queries
from attlas.kernels.toeplitz import _rows
from attlas.ops.block_work import Work, differentiable


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        queries: rows of queries of a tile, at most.
        keys: its keys, at most.
        warps: of a program with all of its queries, or in the kernel that has keys of its keys; those
            with fewer have 4.
        stages: of the loads.
        tma: whether the memory's own engine loads, where it can.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool = False

    def compiled(self, whole: bool) -> dict[str, int]:
        """What a kernel is compiled with."""
        return {"num_warps": self.warps if whole else 4, "num_stages": self.stages}


#: By kernel, bytes of a number and room for a head's channels. Tensor cores of Hopper take 64 rows for
#: every 4 warps. Of blocks with fewer rows or keys a tile has as many as they have.
TILES = {
    ("forward", 2, 64): Tile(128, 128, 8, 3, True), ("forward", 2, 128): Tile(128, 128, 8, 3, True),
    ("forward", 2, 256): Tile(64, 64, 4, 2, True), ("forward", 4, 64): Tile(32, 32, 4, 2),
    ("forward", 4, 128): Tile(32, 32, 4, 2), ("forward", 4, 256): Tile(16, 16, 4, 2),
    ("queries", 2, 64): Tile(128, 64, 8, 3, True), ("queries", 2, 128): Tile(128, 64, 8, 3, True),
    ("queries", 2, 256): Tile(64, 32, 8, 2, True), ("queries", 4, 64): Tile(32, 32, 4, 2),
    ("queries", 4, 128): Tile(32, 16, 4, 2), ("queries", 4, 256): Tile(16, 16, 4, 1),
    ("keys", 2, 64): Tile(64, 128, 8, 3, True), ("keys", 2, 128): Tile(64, 64, 4, 2, True),
    ("keys", 2, 256): Tile(32, 64, 8, 2, True), ("keys", 4, 64): Tile(32, 32, 4, 2),
    ("keys", 4, 128): Tile(16, 32, 4, 2), ("keys", 4, 256): Tile(16, 16, 4, 1),
}  # fmt: skip
#: Rows at most of a tile that takes queries from several blocks.
GATHERED = 32


@dataclass(frozen=True)
class Listed:
    """What of a call is no tensor that could train: the lists, and what holds inside them."""

    blocks: Tensor
    size: tuple[int, int]
    causal: bool
    valid: Tensor | None
    scale: float
    offset: int


class BlockSparse(torch.autograd.Function):
    """Attention to listed blocks with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, listed: Listed, work: Work
    ) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        out, lse = Call(q, k, v, bias, listed).forward()
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.listed, ctx.work = listed, work
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and bias."""
        q, k, v, bias, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradients will themselves be differentiated
            above = torch.zeros_like(out) if d_out is None else d_out
            of_sums = torch.zeros_like(lse) if d_lse is None else d_lse
            return *differentiable(q, k, v, bias, ctx.work, (above, of_sums)), None, None
        found = Call(q, k, v, bias, ctx.listed).backward(out, lse, d_out, d_lse)
        return *found, None, None


class Call:
    """The kernels of one call, with what all of them take."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, listed: Listed
    ) -> None:
        self.q, self.k, self.v, self.bias = q, k, v, bias
        self.blocks, self.valid = listed.blocks.contiguous(), listed.valid
        self.size = listed.size
        self.batch, self.heads, self.queries, self.dim = q.shape
        self.kv_heads, self.keys = k.shape[1:3]
        self.group, self.lists = self.heads // self.kv_heads, self.blocks.shape[1]
        self.share = 1 if self.lists == self.heads else self.group  # heads of a key head with one list
        self.added = None if bias is None else bias.float().expand(k.shape[:3]).contiguous()
        own = self.lists if len(self.blocks) > 1 else 0
        self.last = (self.heads // self.lists, own, listed.scale * LOG2E.value)
        self.first = (self.heads, self.queries, self.keys, listed.offset)
        self.valid_b = 0 if self.valid is None else self.valid.stride(0)
        self.room = max(16, triton.next_power_of_2(self.dim))
        exact = torch.get_float32_matmul_precision() == "highest"
        self.fixed = {
            "D": self.dim, "ROOM": self.room, "QB": self.size[0], "KB": self.size[1],
            "GROUP": self.group, "CAUSAL": listed.causal, "PADDED": self.valid is not None,
            "BIAS": bias is not None,
            "PRECISION": "ieee" if q.itemsize == 2 or exact else "tf32",
        }  # fmt: skip

    def forward(self) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        out, lse = _like(self.q), self.q.new_empty(self.q.shape[:3], dtype=torch.float32)
        grid, fixed = self.by_lists("forward")
        k, v = _loaded(fixed, "BK", self.k, self.v)
        forward[grid](
            self.q, k, v, self.added, self.valid, self.blocks, out, lse, *self.first,
            self.blocks.shape[3], *self.last, *_strides(self.q, self.k, self.v, out), self.valid_b,
            **fixed,
        )  # fmt: skip
        return out, lse

    def backward(
        self, out: Tensor, lse: Tensor, d_out: Tensor | None, d_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and bias."""
        above = out.new_zeros(out.shape) if d_out is None else d_out
        above = above if above.stride(-1) == 1 else above.contiguous()
        sums = self.rows(out, lse, above, d_lse)
        return self.to_queries(above, *sums), *self.to_keys(above, *sums)

    def to_queries(self, above: Tensor, top: Tensor, delta: Tensor) -> Tensor:
        """The gradient of q, of that of out and what `rows` gives."""
        d_q = _like(self.q)
        grid, fixed = self.by_lists("queries")
        k, v = _loaded(fixed, "BK", self.k, self.v)
        backward_queries[grid](
            self.q, k, v, self.added, self.valid, self.blocks, above, top, delta, d_q, *self.first,
            self.blocks.shape[3], *self.last, *_strides(self.q, self.k, self.v, above, d_q),
            self.valid_b, **fixed,
        )  # fmt: skip
        return d_q

    def to_keys(self, above: Tensor, top: Tensor, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Those of k, v and bias."""
        d_k, d_v, there = _like(self.k), _like(self.v), triton.cdiv(self.keys, self.size[1])
        d_bias = None if self.added is None else torch.empty_like(self.added)
        grid, fixed = self.by_keys(above, top)
        loaded = _loaded(fixed, "ROWS", self.q, above, top, delta)
        backward_keys[grid](
            loaded[0], self.k, self.v, self.added, self.valid, *turned(self.blocks, there), *loaded[1:],
            d_k, d_v, d_bias, *self.first, there, *self.last,
            *_strides(self.q, self.k, self.v, above, d_k), self.valid_b, **fixed,
        )  # fmt: skip
        if self.bias is None or d_bias is None:
            return d_k, d_v, None
        return d_k, d_v, d_bias.sum_to_size(self.bias.shape).to(self.bias.dtype)

    def by_lists(self, kernel: str) -> tuple[tuple[int, int], dict[str, Any]]:
        """How a kernel is cut whose programs have queries."""
        tile = self.tile(kernel)
        each = min(self.size[0], tile.queries)
        most = max(1, tile.queries // each)
        pack = max(n for n in range(1, min(self.share, most) + 1) if self.share % n == 0)
        rows, keys = max(16, triton.next_power_of_2(pack * each)), min(self.size[1], tile.keys)
        cut = {
            "PACK": pack, "BQ": each, "ROWS": rows, "BK": keys,
            "EDGE": self.keys % self.size[1] != 0,
            "TMA": tile.tma and _by_tma(self.k, self.v), **tile.compiled(rows >= tile.queries),
        }  # fmt: skip
        grid = (triton.cdiv(self.queries, each), self.batch * self.heads // pack)
        return grid, {**self.fixed, **cut}

    def by_keys(self, above: Tensor, top: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
        """How the kernel is cut whose programs have keys."""
        tile = self.tile("keys")
        keys, rows = min(self.size[1], tile.keys), tile.queries
        if self.size[0] < rows:  # of several blocks, whose places take registers
            rows = min(rows, GATHERED)
        cut = {
            "SHARE": self.share, "ROWS": rows, "BK": keys,
            "EDGE": self.queries % self.size[0] != 0,
            "TMA": tile.tma and rows <= self.size[0] and _by_tma(self.q, above, top),
            **tile.compiled(keys >= tile.keys),
        }  # fmt: skip
        grid = (triton.cdiv(self.keys, keys), self.batch * self.kv_heads)
        return grid, {**self.fixed, **cut}

    def tile(self, kernel: str) -> Tile:
        """The cut of a kernel for these heads."""
        return TILES[kernel, self.q.itemsize, max(64, self.room)]

    def rows(
        self, out: Tensor, lse: Tensor, above: Tensor, d_lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of every row its lse to base 2, +∞ where it sees nothing, and rowsum(dO ∘ O) − dlse."""
        top, delta = torch.empty_like(lse), torch.empty_like(lse)
        size = max(1, min(64, 8192 // self.room))
        _rows[triton.cdiv(self.queries, size), self.batch * self.heads](
            out, above, lse, None if d_lse is None else d_lse.contiguous(), delta, top, self.heads,
            self.queries, *_strides(out, above), dv=self.dim, DV=self.room, ROWS=size, OUT=True,
            LSE=d_lse is not None,
        )  # fmt: skip
        return top, delta


def turned(blocks: Tensor, there: int) -> tuple[Tensor, Tensor]:
    """Lists turned round: (blocks of queries by list and block of keys, ascending; where each begins).

    Of every list, those of no block stand behind the last of `there` blocks, and are never read.
    """
    batch, heads, rows, count = blocks.shape
    each = torch.arange(batch * heads, device=blocks.device).view(batch, heads, 1, 1) * (there + 1)
    number = (torch.where(blocks < 0, there, blocks) + each).to(torch.int32).flatten()
    number, at = number.sort(stable=True)
    starts = torch.arange(batch * heads * (there + 1) + 1, device=blocks.device, dtype=torch.int32)
    begins = torch.searchsorted(number, starts, out_int32=True)
    return (at // count % rows).to(torch.int32), begins


def _like(x: Tensor) -> Tensor:
    """Of x's shape, tokens before heads in memory, as a layer joins heads."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _strides(*tensors: Tensor) -> list[int]:
    return [n for x in tensors for n in x.stride()[:3]]


def _by_tma(*tensors: Tensor) -> bool:
    """Whether the memory's own engine can load rows of these."""
    x = tensors[0]
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    steps = [n * x.itemsize for x in tensors for n in x.stride()[:-1]]
    return all(n > 0 and n % 16 == 0 for n in steps) and all(x.data_ptr() % 16 == 0 for x in tensors)


def _loaded(fixed: dict[str, Any], rows: str, *tensors: Tensor) -> tuple[Any, ...]:
    """Tensors, or descriptors by which so many rows of them are loaded at once."""
    if not fixed["TMA"]:
        return tensors
    cut = [1, 1, fixed[rows], fixed["ROOM"]]
    return tuple(
        TensorDescriptor(x, list(x.shape), list(x.stride()), cut[: x.ndim]) for x in tensors
    )
