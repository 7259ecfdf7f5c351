"""Attention over integers: products of queries and keys in INT8, of weights and values in FP8 or FP16.

    s_ij = (q_i · k_j) δ_j δ_i        m' = max(m, max_j s_ij)        w_ij = 2^(s_ij − m' + lift)
    l' = 2^(m−m') l + Σ_j w_ij        a' = 2^(m−m') a + round(w_i) · v̂
    out = δ_v a / l + v̄              lse = (m + log₂ l − lift) ln 2 + c_i

δ_i holds the scale of the scores and log₂ e, c_i what smoothed keys have lost. A program takes a block of
queries and goes over all keys that they see: first the blocks that nothing cuts, then those at the
diagonal and the end. Each product of weights starts from zero and is added in float32: what tensor cores
add up themselves in FP8 they add in fewer bits.

Keys share a scale by runs and, in a run, by pairs of neighbours modulo 8: of a tile of scores a thread
holds one such group of each run. So the largest of a group is found among integers, and a scale is
multiplied into the exponent, δ_i δ_j at a time. Values lie with tokens next to each other, as FP8
products want them, and in an order (`sage_codes.ordered`) by which a thread's weights are already those
that it gives to the next product. That product runs while the next scores begin, and is added after.

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
from triton.tools.tensor_descriptor import (  # type: ignore[import-untyped, unused-ignore]
    TensorDescriptor,
)

from attlas.kernels.sage_codes import GROUPS, Coded, in_four_bits


@triton.jit
@no_type_check
def _over_keys(
    q, row_scale, k, v, scales, batch, kv_head, top, total, summed, low, high, last, keys, lift, k_n,
    v_d,
    DIM: tl.constexpr, KEYS: tl.constexpr, RUN: tl.constexpr, CUT: tl.constexpr, TMA: tl.constexpr,
    ORDER: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum of weights by group and sum over values, after keys `low` to `high`."""
    rows: tl.constexpr = q.shape[0]
    runs: tl.constexpr = max(1, KEYS // RUN)
    c, n = tl.arange(0, DIM), tl.arange(0, KEYS)
    group = tl.arange(0, runs)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    following = tl.load(scales + low // RUN * GROUPS + group)
    found, shrink = tl.zeros([rows, DIM], tl.float32), tl.full([rows], 1.0, tl.float32)
    for start in range(low, high, KEYS):
        if TMA:
            codes = k.load([batch, kv_head, start, 0]).reshape(KEYS, DIM)
        else:
            at = k + (start + n)[:, None].to(tl.int64) * k_n + c[None, :]
            codes = tl.load(at, mask=(start + n < keys)[:, None], other=0) if CUT else tl.load(at)
        scale = row_scale[:, None, None] * following[None, :, :]
        # Scales have room for one block more than there are.
        following = tl.load(scales + (start + KEYS) // RUN * GROUPS + group)
        products = tl.dot(q, tl.trans(codes), out_dtype=tl.int32)
        summed = summed * shrink[:, None] + found
        products = products.reshape(rows, runs, KEYS // runs // 8, GROUPS, 2)
        if CUT:
            scores = products.to(tl.float32) * scale[:, :, None, :, None]
            key = (start + n).reshape(1, runs, KEYS // runs // 8, GROUPS, 2)
            seen = (key < keys) & (key <= last[:, None, None, None, None])
            scores = tl.where(seen, scores, float("-inf"))
            largest = tl.max(tl.max(scores, 4), 2)
        else:
            largest = tl.max(tl.max(products, 4), 2).to(tl.float32) * scale
        higher = tl.maximum(top, tl.max(tl.max(largest, 1), 1))
        # A row that has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
        base = tl.where(higher == float("-inf"), 0.0, higher) if CUT else higher
        less = (base - lift)[:, None, None, None, None]
        if CUT:
            weights = tl.exp2(scores - less)
        else:
            weights = tl.exp2(products.to(tl.float32) * scale[:, :, None, :, None] - less)
        shrink = tl.exp2(top - base)
        total = total * shrink[:, None] + tl.sum(tl.sum(tl.sum(weights, 4), 2), 1)
        if CAREFUL:
            weights = in_four_bits(weights)
        if TMA:
            values = v.load([batch, kv_head, 0, start]).reshape(DIM, KEYS)
        else:  # values have room for whole blocks, filled with zeros
            values = tl.load(v + c[:, None] * v_d + (start + n)[None, :])
        held = weights.to(values.dtype)
        if ORDER:
            held = held.reshape(rows, KEYS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4)
        found = tl.dot(held.reshape(rows, KEYS), tl.trans(values))
        top = higher
    return top, total, summed * shrink[:, None] + found


@triton.jit(do_not_specialize=["queries", "keys", "offset"])
@no_type_check
def forward(
    q, k, v, row_scales, scales, v_scale, v_mean, common, out, lse, lift, queries, keys, offset,
    scales_b, heads, group, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_d, o_b, o_h, o_n,
    DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, RUN: tl.constexpr,
    CAUSAL: tl.constexpr, SMOOTH_V: tl.constexpr, SMOOTH_K: tl.constexpr, TMA: tl.constexpr,
    ORDER: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    # The last queries see the most keys: they begin first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1)
    batch = tl.program_id(2)
    kv_head = head // group
    row, c = first + tl.arange(0, QUERIES), tl.arange(0, DIM)
    valid = row < queries
    q += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    codes = tl.load(q + row[:, None].to(tl.int64) * q_n + c[None, :], mask=valid[:, None], other=0)
    rows = (batch * heads + head).to(tl.int64) * queries + row
    row_scale = tl.load(row_scales + rows, mask=valid, other=0.0)
    pair = batch * (heads // group) + kv_head
    if not TMA:
        k += batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
        v += batch.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    scales += pair.to(tl.int64) * scales_b

    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES, GROUPS], tl.float32)
    summed = tl.zeros([QUERIES, DIM], tl.float32)
    last, high = row + keys, keys
    whole = keys // KEYS * KEYS
    if CAUSAL:
        last = row + offset
        high = tl.maximum(0, tl.minimum(keys, first + QUERIES + offset))
        whole = tl.maximum(0, tl.minimum(whole, (first + offset + 1) // KEYS * KEYS))
    top, total, summed = _over_keys(
        codes, row_scale, k, v, scales, batch, kv_head, top, total, summed, 0, whole, last, keys, lift,
        k_n, v_d, DIM, KEYS, RUN, False, TMA, ORDER, CAREFUL,
    )  # fmt: skip
    top, total, summed = _over_keys(
        codes, row_scale, k, v, scales, batch, kv_head, top, total, summed, whole, high, last, keys,
        lift, k_n, v_d, DIM, KEYS, RUN, True, TMA, ORDER, CAREFUL,
    )  # fmt: skip

    every = tl.sum(total, 1)
    seen = every > 0.0
    mean = summed / tl.where(seen, every, 1.0)[:, None] * tl.load(v_scale + pair * DIM + c)[None, :]
    if SMOOTH_V:
        taken = tl.load(v_mean + pair * DIM + c)
        mean = tl.where(seen[:, None], mean + taken[None, :], mean)
    out += batch.to(tl.int64) * o_b + head.to(tl.int64) * o_h
    at = out + row[:, None].to(tl.int64) * o_n + c[None, :]
    tl.store(at, mean.to(out.dtype.element_ty), mask=valid[:, None])
    sums = (top + tl.log2(every) - lift) * 0.6931471805599453
    if SMOOTH_K:
        sums += tl.load(common + rows, mask=valid, other=0.0)
    tl.store(lse + rows, sums, mask=valid)


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a block, and what runs it."""

    queries: int = 64
    keys: int = 128
    warps: int = 4
    stages: int = 3


def sage_forward(
    given: Coded, *, causal: bool, offset: int, lift: float, out_dtype: torch.dtype,
    cut: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of integers.

    Args:
        given: queries, keys and values.
        causal: query i sees keys up to i + offset.
        offset: position of the first query.
        lift: power of two by which weights are larger when they are rounded.
        out_dtype: of the outputs.
        cut: tiles other than the usual.
    """
    q, k, v = given.q, given.k, given.v
    batch, heads, queries, dim = q.shape
    # Tokens before heads in memory, as a layer joins heads.
    out = q.new_empty(batch, queries, heads, dim, dtype=out_dtype).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    strides = [n for x in (q, k, v, out) for n in x.stride()[:3]]
    tma = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    cut = cut or (Tiles() if tma else Tiles(128, 128, 8, 2))
    if tma:
        k, v = (
            TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, *size])
            for x, size in ((k, (cut.keys, dim)), (v, (dim, cut.keys)))
        )
    forward[triton.cdiv(queries, cut.queries), heads, batch](
        q, k, v, given.row_scale, given.scales, given.v_scale, given.v_mean, given.common, out, lse,
        lift, queries, given.k.shape[2], offset, given.scales.stride(1), heads,
        heads // given.k.shape[1], *strides,
        DIM=dim, QUERIES=cut.queries, KEYS=cut.keys, RUN=given.run, CAUSAL=causal,
        SMOOTH_V=given.v_mean is not None, SMOOTH_K=given.common is not None, TMA=tma,
        ORDER=given.v.dtype == torch.float8_e4m3fn, CAREFUL=not q.is_cuda and lift > 0,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out, lse
