"""Rows of packed queries: where each query lies is looked up where it is read, and nothing is stacked.

    taken      rows_r = x_token(r)                              back: d x_t = Σ_s d rows_row(t, s)
    joined     lse_t = log Σ_p exp(lse_p)    out_t = Σ_p exp(lse_p − lse_t) out_p
               p: the query's own part, where there is one, and its rows
    back       d out_p = w_p d out_t    d lse_p = w_p (d out_t · (out_p − out_t) + d lse_t)
               w_p = exp(lse_p − lse_t)

A row number that is the number of rows stands for none. A program has some queries, or rows, of one
head. Gradients need no atomics: each row is one query's alone.

Cost: each number is read once and written once.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

#: Queries or rows of a program.
EACH = 32
VARYING = ["tokens", "rows", "heads"]


@triton.jit(do_not_specialize=VARYING)
@no_type_check
def _take(
    x, at, found, tokens, rows, heads, x_b, x_h, x_t, f_b, f_h, f_t,
    D: tl.constexpr, ROOM: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Some rows of one head."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    n, c = tl.program_id(0) * EACH + tl.arange(0, EACH), tl.arange(0, ROOM)
    inside = (n < rows)[:, None] & (c < D)[None, :]
    token = tl.load(at + pair * rows + n, mask=n < rows, other=0)[:, None]
    given = tl.load(x + batch * x_b + head * x_h + token * x_t + c[None, :], mask=inside)
    place = found + batch * f_b + head * f_h + n[:, None].to(tl.int64) * f_t + c[None, :]
    tl.store(place, given, mask=inside)


@triton.jit(do_not_specialize=[*VARYING, "count"])
@no_type_check
def _sum(
    x, at, found, tokens, rows, heads, count, x_b, x_h, x_t, f_b, f_h, f_t,
    D: tl.constexpr, ROOM: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Of some queries of one head the sum of their rows."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    n, c = tl.program_id(0) * EACH + tl.arange(0, EACH), tl.arange(0, ROOM)
    acc = tl.zeros([EACH, ROOM], tl.float32)
    for s in range(count):
        row = tl.load(at + (pair * tokens + n) * count + s, mask=n < tokens, other=rows)[:, None]
        place = x + batch * x_b + head * x_h + row * x_t + c[None, :]
        acc += tl.load(place, mask=(row < rows) & (c < D)[None, :], other=0.0).to(tl.float32)
    place = found + batch * f_b + head * f_h + n[:, None].to(tl.int64) * f_t + c[None, :]
    inside = (n < tokens)[:, None] & (c < D)[None, :]
    tl.store(place, acc.to(found.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _added(acc, total, top, x, seen, lse):
    """Sums and their maximum with one more part."""
    higher = tl.maximum(top, lse)
    # What has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink, share = tl.exp(top - base), tl.exp(lse - base)
    acc = acc * shrink[:, None] + tl.load(x, mask=seen, other=0.0).to(tl.float32) * share[:, None]
    return acc, total * shrink + share, higher


@triton.jit(do_not_specialize=[*VARYING, "count"])
@no_type_check
def _join(
    own, own_lse, x, x_lse, at, out, lse, tokens, rows, heads, count,
    n_b, n_h, n_t, x_b, x_h, x_t, o_b, o_h, o_t,
    D: tl.constexpr, ROOM: tl.constexpr, EACH: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Some queries of one head, of all their parts."""
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    n, c = tl.program_id(0) * EACH + tl.arange(0, EACH), tl.arange(0, ROOM)
    live, wide = n < tokens, (c < D)[None, :]
    token = n[:, None].to(tl.int64)
    acc, total = tl.zeros([EACH, ROOM], tl.float32), tl.zeros([EACH], tl.float32)
    top = tl.full([EACH], float("-inf"), tl.float32)
    if OWN:
        sums = tl.load(own_lse + pair * tokens + n, mask=live, other=float("-inf"))
        place = own + batch * n_b + head * n_h + token * n_t + c[None, :]
        acc, total, top = _added(acc, total, top, place, live[:, None] & wide, sums)
    for s in range(count):
        row = tl.load(at + (pair * tokens + n) * count + s, mask=live, other=rows)
        sums = tl.load(x_lse + pair * rows + row, mask=row < rows, other=float("-inf"))
        place = x + batch * x_b + head * x_h + row[:, None] * x_t + c[None, :]
        acc, total, top = _added(acc, total, top, place, (row < rows)[:, None] & wide, sums)
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    place = out + batch * o_b + head * o_h + token * o_t + c[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=live[:, None] & wide)
    tl.store(lse + pair * tokens + n, top + tl.log(total), mask=live)


@triton.jit
@no_type_check
def _said(x, seen, above):
    """What the gradient of the output says of one part."""
    return tl.sum(above * tl.load(x, mask=seen, other=0.0).to(tl.float32), 1)


@triton.jit
@no_type_check
def _weighed(mean, total, top, said, lse):
    """The sums behind one more part, of what the gradient says and of weights."""
    higher = tl.maximum(top, lse)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink, share = tl.exp(top - base), tl.exp(lse - base)
    return mean * shrink + said * share, total * shrink + share, higher


@triton.jit(do_not_specialize=[*VARYING, "count"])
@no_type_check
def _join_back(
    own, own_lse, x, x_lse, at, above, of_sums, d_own, d_own_lse, d_x, d_x_lse,
    tokens, rows, heads, count, n_b, n_h, n_t, x_b, x_h, x_t, a_b, a_h, a_t,
    D: tl.constexpr, ROOM: tl.constexpr, EACH: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """What some queries of one head hand on to their parts, which lie as their gradients do.

    A first pass finds Σ_p w_p d out · out_p: of an output that has been rounded it would be less exact.
    """
    pair = tl.program_id(1).to(tl.int64)
    batch, head = pair // heads, pair % heads
    n, c = tl.program_id(0) * EACH + tl.arange(0, EACH), tl.arange(0, ROOM)
    live, wide = n < tokens, (c < D)[None, :]
    token, seen = n[:, None].to(tl.int64), live[:, None] & wide
    place = above + batch * a_b + head * a_h + token * a_t + c[None, :]
    up = tl.load(place, mask=seen, other=0.0).to(tl.float32)
    mean, total = tl.zeros([EACH], tl.float32), tl.zeros([EACH], tl.float32)
    top = tl.full([EACH], float("-inf"), tl.float32)
    mine = batch * n_b + head * n_h + token * n_t + c[None, :]
    if OWN:
        own_sums = tl.load(own_lse + pair * tokens + n, mask=live, other=float("-inf"))
        mean, total, top = _weighed(mean, total, top, _said(own + mine, seen, up), own_sums)
    for s in range(count):
        row = tl.load(at + (pair * tokens + n) * count + s, mask=live, other=rows)
        sums = tl.load(x_lse + pair * rows + row, mask=row < rows, other=float("-inf"))
        place = x + batch * x_b + head * x_h + row[:, None] * x_t + c[None, :]
        said = _said(place, (row < rows)[:, None] & wide, up)
        mean, total, top = _weighed(mean, total, top, said, sums)
    total = tl.where(total == 0.0, 1.0, total)
    top = tl.where(top == float("-inf"), 0.0, top)
    less = mean / total - tl.load(of_sums + pair * tokens + n, mask=live, other=0.0)
    if OWN:
        share, said = tl.exp(own_sums - top) / total, _said(own + mine, seen, up)
        tl.store(d_own + mine, (up * share[:, None]).to(d_own.dtype.element_ty), mask=seen)
        tl.store(d_own_lse + pair * tokens + n, share * (said - less), mask=live)
    for s in range(count):
        row = tl.load(at + (pair * tokens + n) * count + s, mask=live, other=rows)
        there = row < rows
        sums = tl.load(x_lse + pair * rows + row, mask=there, other=float("-inf"))
        lies = batch * x_b + head * x_h + row[:, None] * x_t + c[None, :]
        share, said = tl.exp(sums - top) / total, _said(x + lies, there[:, None] & wide, up)
        given = (up * share[:, None]).to(d_x.dtype.element_ty)
        tl.store(d_x + lies, given, mask=there[:, None] & wide)
        tl.store(d_x_lse + pair * rows + row, share * (said - less), mask=there)


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """The queries [batch, heads, rows, dim] of `tokens` [batch, heads, rows]."""
    found = _like(x, tokens.shape[2])
    _take[_grid(found)](
        x, tokens, found, x.shape[2], found.shape[2], x.shape[1], *_strides(x, found), **_fixed(x)
    )
    return found


def summed(x: Tensor, rows: Tensor) -> Tensor:
    """Of each query the sum of its `rows` [batch, heads, queries, count]."""
    found = _like(x, rows.shape[2])
    _sum[_grid(found)](
        x, rows, found, found.shape[2], x.shape[2], x.shape[1], rows.shape[3], *_strides(x, found),
        **_fixed(x),
    )  # fmt: skip
    return found


def join(
    own: Tensor | None, own_lse: Tensor | None, x: Tensor, x_lse: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse) of each query, of its own part and its `rows` [batch, heads, queries, count]."""
    out = _like(x, rows.shape[2])
    lse = x_lse.new_empty(rows.shape[:3])
    beside = x if own is None else own
    _join[_grid(out)](
        own, own_lse, x, x_lse, rows, out, lse, rows.shape[2], x.shape[2], x.shape[1], rows.shape[3],
        *_strides(beside, x, out), OWN=own is not None, **_fixed(x),
    )  # fmt: skip
    return out, lse


def join_back(
    own: Tensor | None, own_lse: Tensor | None, x: Tensor, x_lse: Tensor, rows: Tensor, above: Tensor,
    of_sums: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The gradients of both parts and of their sums; 0 of rows that are no query's."""
    above = above if above.stride(-1) == 1 else above.contiguous()
    d_own, d_own_lse = None, None
    if own is not None and own_lse is not None:
        d_own, d_own_lse = torch.zeros_like(own), torch.zeros_like(own_lse)
        own = _lying(own, d_own)
    d_x, d_x_lse = torch.zeros_like(x), torch.zeros_like(x_lse)
    x, beside = _lying(x, d_x), x if own is None else own
    _join_back[_grid(above)](
        own, own_lse, x, x_lse, rows, above, of_sums.contiguous(), d_own, d_own_lse, d_x, d_x_lse,
        rows.shape[2], x.shape[2], x.shape[1], rows.shape[3], *_strides(beside, x, above),
        OWN=own is not None, **_fixed(x),
    )  # fmt: skip
    return d_own, d_own_lse, d_x, d_x_lse


def _lying(x: Tensor, room: Tensor) -> Tensor:
    """A tensor that lies in memory as another."""
    return x if x.stride() == room.stride() else torch.empty_like(room).copy_(x)


def _like(x: Tensor, tokens: int) -> Tensor:
    """Room for so many tokens, which stand before heads in memory, as a layer joins heads."""
    return x.new_empty(x.shape[0], tokens, x.shape[1], x.shape[3]).transpose(1, 2)


def _grid(found: Tensor) -> tuple[int, int]:
    return triton.cdiv(found.shape[2], EACH), found.shape[0] * found.shape[1]


def _strides(*tensors: Tensor) -> list[int]:
    return [n for x in tensors for n in x.stride()[:3]]


def _fixed(x: Tensor) -> dict[str, Any]:
    return {"D": x.shape[3], "ROOM": triton.next_power_of_2(x.shape[3]), "EACH": EACH}
