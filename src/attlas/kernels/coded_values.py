"""Sums of values by weights, for the kernel over codes: what codes, steps and zeros each add.

Shapes are those of `attlas.kernels.coded_queries`: columns are [HIGH, rows, LOW]. The sums over codes are
[tiles · warps, words of a tile, columns] for each place in a word.
"""

# ruff: noqa: N803, N806, RUF005  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.bits import numbers, scale, whole
from attlas.kernels.coded_queries import by_column, own


@triton.jit
@no_type_check
def partly(x, AXIS: tl.constexpr):
    """x summed over its slots but for 8 places: over those that lie in one thread."""
    if AXIS == 1:
        found = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8, x.shape[2]]), 1)
    else:
        x = tl.reshape(
            x, [x.shape[0], x.shape[1], x.shape[2] // 8, 8, x.shape[3], x.shape[4], x.shape[5]]
        )
        found = tl.sum(x, 2)
    return found


@triton.jit
@no_type_check
def levelled(level, p, shrink, zero, VALUES: tl.constexpr):
    """Σ_n p_n zero_n with a block's: [warps, 8, rows], of groups [tiles, warps, 8, HIGH, rows, LOW]."""
    zero = zero.to(tl.float32)
    if VALUES.groups == 1:
        level = level * shrink[:, None, :] + partly(p * zero[:, :, None], 1)
    else:
        more = p[None, :, :, None, :, None] * by_column(zero, VALUES)
        level = level * shrink[None, :, None, None, :, None] + partly(more, 2)
    return level


@triton.jit
@no_type_check
def _as_columns(x, VALUES: tl.constexpr):
    """x [tiles or 1, warps, slots, HIGH or 1, rows, LOW or 1] for every column of a product."""
    TILES: tl.constexpr = VALUES.tiles
    HIGH: tl.constexpr = VALUES.high
    LOW: tl.constexpr = VALUES.low
    x = tl.broadcast_to(x, [TILES, x.shape[1], x.shape[2], HIGH, x.shape[4], LOW])
    return tl.reshape(x, [TILES * x.shape[1], x.shape[2], HIGH * x.shape[4] * LOW])


@triton.jit
@no_type_check
def added(summed, words, more, p, shrink, steps, VALUES: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Σ_n p_n v_n with a block's, for each place in a word [tiles · warps, words, columns].

    Where every token has steps, zeros are left out, and what `numbers` scales by.
    """
    HALF: tl.constexpr = VALUES.half
    EACH: tl.constexpr = VALUES.each
    PRECISION: tl.constexpr = "tf32" if HALF else "tf32x3"
    step, zero = steps
    codes = numbers(words, more, VALUES.bits, EACH, HALF, ASSEMBLY)
    TYPE: tl.constexpr = codes[0].dtype
    weights = p.to(TYPE)[None, :, :, None, :, None]
    if VALUES.groups > 1:
        weights = (weights * by_column(step, VALUES)).to(TYPE)
    elif VALUES.tokens == 1:
        weights = (weights * step[None, :, :, None, None, None]).to(TYPE)
    weights = _as_columns(weights, VALUES)
    shrink = _as_columns(shrink[None, :, None, None, :, None], VALUES)
    if VALUES.tokens > 1:
        share = _as_columns(tl.sum(p, 1)[None, :, None, None, :, None], VALUES)
    found = ()
    for i in tl.static_range(EACH):
        kept = summed[i] * shrink
        if VALUES.tokens == 1:
            kept = tl.dot(codes[i], weights, kept, input_precision=PRECISION)
        else:
            met = tl.dot(codes[i], weights, input_precision=PRECISION)
            factor = scale(i, EACH, HALF) * (2.0**24 if HALF else 1.0)
            kept += met * (step[i].to(tl.float32) * factor)[:, :, None]
            kept += share * zero[i].to(tl.float32)[:, :, None]
        found = found + (kept,)
    return found


@triton.jit
@no_type_check
def means(summed, level, VALUES: tl.constexpr):
    """Σ_n p_n v_n of each warp's slots: [tiles, warps, words, rows, places in a word]."""
    TILES: tl.constexpr = VALUES.tiles
    WORDS: tl.constexpr = VALUES.words
    EACH: tl.constexpr = VALUES.each
    HIGH: tl.constexpr = VALUES.high
    LOW: tl.constexpr = VALUES.low
    WARPS: tl.constexpr = summed[0].shape[0] // TILES
    ROWS: tl.constexpr = summed[0].shape[2] // (HIGH * LOW)
    w = tl.arange(0, TILES)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    found = ()
    for i in tl.static_range(EACH):
        x = tl.reshape(summed[i], [TILES, WARPS, WORDS, HIGH, ROWS, LOW])
        if VALUES.tokens == 1:
            x *= scale(i, EACH, VALUES.half) * (2.0**24 if VALUES.half else 1.0)
        if VALUES.groups > 1:
            x += tl.sum(level, 2)[:, :, None]
        x = tl.sum(tl.sum(tl.where(own(w * EACH + i, VALUES)[:, None], x, 0.0), 5), 3)
        if VALUES.narrow:
            x += tl.sum(level, 1)[None, :, None, :]
        found = found + (x,)
    return whole(found, EACH)
