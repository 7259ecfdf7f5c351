"""Queries, keys and values in few bits: means, scales and codes without a float32 copy of anything.

    k̄, v̄, min v, max v      of each channel, by runs of tokens, and those of all runs joined
    δ = max|x| / (2^(bits−1) − 1) of a group      x̂ = x / δ, halves away from zero      x: q, or k − k̄
    δ_v = max|v − v̄| / 448 of a channel            v̂ = (v − v̄) / δ_v in FP8

A program has one run of tokens, whose groups are in it whole: it reads them once and writes their codes
once. Values are written with tokens next to each other, as `attlas.kernels.sage` reads them.

Cost: k and v are read twice, q once, and half as many bytes are written.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

#: Groups of keys of a run that have a scale each.
GROUPS = tl.constexpr(4)
#: Whole blocks of keys that there is room for.
KEYS = 128
#: Largest number of FP8 (e4m3).
FP8 = 448.0
#: Tokens of which a program finds sums, and those it takes at once.
SPAN, ROWS = 256, 32
#: Tokens of values that a program writes.
PLACES = 64


@triton.jit
@no_type_check
def ordered(place):
    """The key at a place among values of 8 bits, by which the 4 of 16 of a thread are neighbours."""
    return place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2


@triton.jit
@no_type_check
def in_four_bits(x):
    """Numbers below 2⁹ as FP8 holds them, for Triton's interpreter, which drops carries in rounding."""
    split = x * 1048577.0
    return split - (split - x)


@triton.jit
@no_type_check
def extents(
    k, v, found, tokens, heads, k_b, k_h, k_n, v_b, v_h, v_n,
    DIM: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Of a run of tokens of one head: Σ k, Σ v, min v, max v of each channel."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    n, c = tl.arange(0, ROWS), tl.arange(0, DIM)
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    k_sum, v_sum = tl.zeros([DIM], tl.float32), tl.zeros([DIM], tl.float32)
    low, high = tl.full([DIM], float("inf"), tl.float32), tl.full([DIM], float("-inf"), tl.float32)
    first = tl.program_id(0) * SPAN
    for start in range(first, tl.minimum(first + SPAN, tokens), ROWS):
        token = (start + n)[:, None].to(tl.int64)
        live = token < tokens
        k_sum += tl.sum(tl.load(k + token * k_n + c[None, :], mask=live, other=0.0).to(tl.float32), 0)
        value = tl.load(v + token * v_n + c[None, :], mask=live, other=0.0).to(tl.float32)
        v_sum += tl.sum(value, 0)
        low = tl.minimum(low, tl.min(tl.where(live, value, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(live, value, float("-inf")), 0))
    at = found + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 4 * DIM + c
    tl.store(at, k_sum)
    tl.store(at + DIM, v_sum)
    tl.store(at + 2 * DIM, low)
    tl.store(at + 3 * DIM, high)


@triton.jit(do_not_specialize=["before", "after", "largest", "tiny", "scale"])
@no_type_check
def integers(
    x, mean, codes, scales, common, tokens, heads, group, room, before, after, largest, tiny, scale,
    x_b, x_h, x_n,
    DIM: tl.constexpr, RUN: tl.constexpr, ROOM: tl.constexpr, GROUPED: tl.constexpr,
    NEAR: tl.constexpr, SMOOTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """One run of tokens of one head; `common` is what the mean adds to the scores of queries."""
    pair, run = tl.program_id(1).to(tl.int64), tl.program_id(0)
    n, c = tl.arange(0, ROOM), tl.arange(0, DIM)
    token = run * RUN + n
    live = (n < RUN) & (token < tokens)
    at = x + pair // heads * x_b + pair % heads * x_h + token[:, None].to(tl.int64) * x_n + c[None, :]
    units = tl.load(at, mask=live[:, None], other=0.0).to(tl.float32)
    if SMOOTH:
        of = tl.load(mean + pair // group * DIM + c)[None, :]
        if QUERIES:
            tl.store(common + pair * tokens + token, tl.sum(units * of, 1) * scale, mask=live)
        else:
            units = tl.where(live[:, None], units - of, 0.0)
    units *= before
    most = tl.max(tl.abs(units), 1).reshape(ROOM // GROUPED // NEAR, GROUPED, NEAR)
    delta = tl.div_rn(tl.max(tl.max(most, 2), 0), tl.full([GROUPED], largest, tl.float32)) + tiny
    each = tl.broadcast_to(delta[None, :, None], most.shape).reshape(ROOM)
    if QUERIES:
        tl.store(scales + pair * tokens + token, each * after, mask=live)
    else:
        tl.store(scales + (pair * room + run) * GROUPED + tl.arange(0, GROUPED), delta)
    units = tl.div_rn(units, tl.broadcast_to(tl.where(each == 0.0, 1.0, each)[:, None], units.shape))
    units += tl.where(units >= 0.0, 0.5, -0.5)
    at = codes + (pair * tokens + token)[:, None] * DIM + c[None, :]
    tl.store(at, units.to(tl.int8), mask=live[:, None])


@triton.jit
@no_type_check
def turned(
    v, mean, most, codes, tokens, heads, room, v_b, v_h, v_n,
    DIM: tl.constexpr, PLACES: tl.constexpr, SMOOTH: tl.constexpr, ORDER: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head, rounded, with tokens next to each other."""
    pair = tl.program_id(1).to(tl.int64)
    place, c = tl.program_id(0) * PLACES + tl.arange(0, PLACES), tl.arange(0, DIM)
    token = ordered(place) if ORDER else place
    live = (token < tokens)[:, None]
    at = v + pair // heads * v_b + pair % heads * v_h + token[:, None].to(tl.int64) * v_n + c[None, :]
    x = tl.load(at, mask=live, other=0.0).to(tl.float32)
    if SMOOTH:
        x = tl.where(live, x - tl.load(mean + pair * DIM + c)[None, :], 0.0)
    if ORDER:  # of 8 bits
        whole = tl.load(most + pair * DIM + c)
        whole = tl.broadcast_to(tl.where(whole == 0.0, 1.0, whole)[None, :], x.shape)
        x = tl.minimum(tl.maximum(tl.div_rn(x * 448.0, whole), -448.0), 448.0)
        if CAREFUL:
            x = in_four_bits(x)
    at = codes + (pair * DIM + c)[:, None] * room + place[None, :]
    tl.store(at, tl.trans(x.to(codes.dtype.element_ty)))


@dataclass(frozen=True)
class Bits:
    """What queries, keys and values are to become.

    Attributes:
        largest: integer.
        eight: whether values are rounded to FP8, not FP16.
        threads: whether threads' groups share a scale, not blocks.
        q_run: queries of a run, or of a block.
        k_run: keys likewise.
        smooth_k: take out the mean of all keys.
        smooth_v: take out the mean of all values.
        tiny: added to the scales of threads' groups.
    """

    largest: int
    eight: bool
    threads: bool
    q_run: int
    k_run: int
    smooth_k: bool
    smooth_v: bool
    tiny: float


class Coded(NamedTuple):
    """Queries, keys and values as `sage_forward` takes them; `room` of values is whole blocks of keys.

    Attributes:
        q: integers.
        row_scale: of each query, with the scale of the scores and log₂ e in it.
        k: integers.
        scales: of a run's groups of keys; there are more runs than keys fill.
        run: keys of a run.
        v: values, tokens next to each other; those of 8 bits `ordered`.
        v_scale: of each channel.
        v_mean: what is added to each output, or None.
        common: what is added to the sums of exponentials, or None.
    """

    q: Int8[Tensor, "batch heads queries dim"]
    row_scale: Float[Tensor, "batch heads queries"]
    k: Int8[Tensor, "batch kv_heads keys dim"]
    scales: Float[Tensor, "batch kv_heads runs 4"]
    run: int
    v: Shaped[Tensor, "batch kv_heads dim room"]
    v_scale: Float[Tensor, "batch kv_heads 1 dim"]
    v_mean: Float[Tensor, "batch kv_heads 1 dim"] | None
    common: Float[Tensor, "batch heads queries"] | None


def coded(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys dim"],
    scale: float,
    log2e: float,
    bits: Bits,
) -> Coded:
    """Queries, keys and values in few bits."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, kv_heads, keys, dim = k.shape
    pairs, chunks = batch * kv_heads, triton.cdiv(keys, SPAN)
    parts = k.new_empty(batch, kv_heads, chunks, 4, dim, dtype=torch.float32)
    extents[chunks, pairs](
        k, v, parts, keys, kv_heads, *k.stride()[:3], *v.stride()[:3], DIM=dim, ROWS=ROWS, SPAN=SPAN
    )
    k_mean, v_mean = (parts[:, :, :, :2].sum(2) / keys).unbind(2)  # each [batch, kv_heads, dim]
    k_mean, v_mean = k_mean.contiguous(), v_mean.contiguous()
    low, high = parts[:, :, :, 2].amin(2), parts[:, :, :, 3].amax(2)
    most = torch.maximum(high - v_mean, v_mean - low) if bits.smooth_v else torch.maximum(high, -low)

    room = triton.cdiv(keys, KEYS) * KEYS
    values = v.new_empty(
        batch, kv_heads, dim, room, dtype=torch.float8_e4m3fn if bits.eight else torch.float16
    )
    turned[room // PLACES, pairs](
        v, v_mean, most, values, keys, kv_heads, room, *v.stride()[:3], DIM=dim, PLACES=PLACES,
        SMOOTH=bits.smooth_v, ORDER=bits.eight, CAREFUL=not v.is_cuda,
    )  # fmt: skip

    runs, groups = (room + KEYS) // bits.k_run + 1, GROUPS.value if bits.threads else 1
    k_codes = torch.empty(k.shape, dtype=torch.int8, device=k.device)
    scales = most.new_empty(batch, kv_heads, runs, groups)
    q_codes = torch.empty(q.shape, dtype=torch.int8, device=q.device)
    row_scale, common = (most.new_empty(q.shape[:3]) for _ in range(2))
    before, after = (1.0, scale * log2e) if bits.threads else (scale * log2e, 1.0)
    for x, codes, each, kind, run, factors in (
        (k, k_codes, scales, (groups, 2, False), bits.k_run, (1.0, 1.0)),
        (q, q_codes, row_scale, (2 * groups, 1, True), bits.q_run, (before, after)),
    ):
        grouped, near, queries = kind if bits.threads else (1, 1, kind[2])
        size = max(8, triton.next_power_of_2(run))
        integers[triton.cdiv(x.shape[2], run), batch * x.shape[1]](
            x, k_mean, codes, each, common, x.shape[2], x.shape[1], x.shape[1] // kv_heads, runs,
            *factors, float(bits.largest), bits.tiny if bits.threads else 0.0, scale, *x.stride()[:3],
            DIM=dim, RUN=run, ROOM=size, GROUPED=grouped, NEAR=near, SMOOTH=bits.smooth_k,
            QUERIES=queries, num_warps=4 if size * dim <= 8192 else 8,
        )  # fmt: skip
    v_scale = (most / FP8 if bits.eight else torch.ones_like(most))[:, :, None]
    return Coded(
        q_codes, row_scale, k_codes, scales.expand(-1, -1, -1, GROUPS.value).contiguous(), bits.k_run,
        values, v_scale, v_mean[:, :, None] if bits.smooth_v else None,
        common if bits.smooth_k else None,
    )  # fmt: skip
