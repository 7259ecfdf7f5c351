"""Attention over integers: products of queries and keys in INT8, of weights and values in FP8 or FP16.

    s_ij = (q_i · k_j) δ_j δ_i        m' = max(m, max_j s_ij)        w_ij = 2^(s_ij − m' + lift)
    l' = 2^(m−m') l + Σ_j w_ij        a' = 2^(m−m') a + round(w_i) · v̂
    out = δ_v a / l + v̄              lse = (m + log₂ l − lift) ln 2

δ_i holds the scale of the scores and log₂ e. A program takes a block of queries and goes over all keys
that they see: first the blocks that nothing cuts, then those at the diagonal and the end. Each product
of weights starts from zero and is added in float32: what tensor cores add up themselves in FP8 they add
in fewer bits. Values lie with tokens next to each other, as FP8 products want them.

Cost: 2 · n² · dim operations at twice the rate of half precision each, the exponentials in float32.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor


@triton.jit
@no_type_check
def _over_keys(
    q, row_scale, k, v, column_scales, top, total, summed, low, high, last, keys, lift, k_n, v_d,
    DIM: tl.constexpr, KEYS: tl.constexpr, CUT: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum of weights and sum over values, after keys `low` to `high`."""
    c = tl.arange(0, DIM)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        at = k + key[:, None].to(tl.int64) * k_n + c[None, :]
        if CUT:
            inside = key < keys
            codes = tl.load(at, mask=inside[:, None], other=0)
            columns = tl.load(column_scales + key, mask=inside, other=0.0)
        else:
            codes = tl.load(at)
            columns = tl.load(column_scales + key)
        products = tl.dot(q, tl.trans(codes), out_dtype=tl.int32)
        scores = products.to(tl.float32) * columns[None, :] * row_scale[:, None]
        if CUT:
            seen = inside[None, :] & (key[None, :] <= last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - (base - lift)[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        if CAREFUL:  # Triton's interpreter drops carries when it rounds to FP8: here to 4 bits before
            split = weights * 1048577.0
            weights = split - (split - weights)
        # Values have room for whole blocks, filled with zeros.
        values = tl.trans(tl.load(v + c[:, None] * v_d + key[None, :]))
        summed = summed * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        top = higher
    return top, total, summed


@triton.jit(do_not_specialize=["queries", "keys", "offset"])
@no_type_check
def _forward(
    q, k, v, row_scales, column_scales, v_scale, v_mean, out, lse, lift, queries, keys, offset, heads,
    group, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_d,
    DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    SMOOTH: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    # The last queries see the most keys: they begin first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // group
    row, c = first + tl.arange(0, QUERIES), tl.arange(0, DIM)
    valid = row < queries
    q += batch * q_b + head * q_h
    codes = tl.load(q + row[:, None].to(tl.int64) * q_n + c[None, :], mask=valid[:, None], other=0)
    rows = (batch * heads + head) * queries + row
    row_scale = tl.load(row_scales + rows, mask=valid, other=0.0)
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    pair = batch * (heads // group) + kv_head
    column_scales += pair * keys

    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, DIM], tl.float32)
    last, high = row + keys, keys
    whole = keys // KEYS * KEYS
    if CAUSAL:
        last = row + offset
        high = tl.maximum(0, tl.minimum(keys, first + QUERIES + offset))
        whole = tl.maximum(0, tl.minimum(whole, (first + offset + 1) // KEYS * KEYS))
    top, total, summed = _over_keys(
        codes, row_scale, k, v, column_scales, top, total, summed, 0, whole, last, keys, lift, k_n,
        v_d, DIM, KEYS, False, CAREFUL,
    )  # fmt: skip
    top, total, summed = _over_keys(
        codes, row_scale, k, v, column_scales, top, total, summed, whole, high, last, keys, lift, k_n,
        v_d, DIM, KEYS, True, CAREFUL,
    )  # fmt: skip

    seen = total > 0.0
    mean = summed / tl.where(seen, total, 1.0)[:, None] * tl.load(v_scale + pair * DIM + c)[None, :]
    if SMOOTH:
        taken = tl.load(v_mean + pair * DIM + c)
        mean = tl.where(seen[:, None], mean + taken[None, :], mean)
    at = out + rows[:, None] * DIM + c[None, :]
    tl.store(at, mean.to(out.dtype.element_ty), mask=valid[:, None])
    tl.store(lse + rows, (top + tl.log2(total) - lift) * 0.6931471805599453, mask=valid)


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a block, and what runs it."""

    queries: int = 128
    keys: int = 128
    warps: int = 8
    stages: int = 3


def sage_forward(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor, column_scale: Tensor, v_scale: Tensor,
    v_mean: Tensor | None, *, causal: bool, offset: int, lift: float, out_dtype: torch.dtype,
    cut: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of integers.

    Args:
        q: [batch, heads, queries, dim] INT8.
        k: [batch, kv_heads, keys, dim] INT8.
        v: [batch, kv_heads, keys, dim] FP8 (e4m3) or FP16.
        row_scale: [batch, heads, queries], with the scale of the scores and log₂ e in it.
        column_scale: [batch, kv_heads, keys].
        v_scale: [batch, kv_heads, 1, dim].
        v_mean: what is added to each output, alike, or None.
        causal: query i sees keys up to i + offset.
        offset: position of the first query.
        lift: power of two by which weights are larger when they are rounded.
        out_dtype: of the outputs.
        cut: tiles other than the usual.
    """
    batch, heads, queries, dim = q.shape
    keys, cut = k.shape[2], cut or Tiles()
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    room = triton.cdiv(keys, cut.keys) * cut.keys
    columns = torch.zeros(*v.shape[:2], dim, room, dtype=v.dtype, device=v.device)
    columns[..., :keys] = v.mT
    q, k, row_scale, column_scale, v_scale = (
        x.contiguous() for x in (q, k, row_scale, column_scale, v_scale)
    )
    taken = v_scale if v_mean is None else v_mean.contiguous()
    grid = (triton.cdiv(queries, cut.queries), heads, batch)
    _forward[grid](
        q, k, columns, row_scale, column_scale, v_scale, taken, out, lse, lift,
        queries, keys, offset, heads, heads // k.shape[1],
        *q.stride()[:3], *k.stride()[:3], *columns.stride()[:3],
        DIM=dim, QUERIES=cut.queries, KEYS=cut.keys, CAUSAL=causal, SMOOTH=v_mean is not None,
        CAREFUL=not q.is_cuda and lift > 0, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out, lse
