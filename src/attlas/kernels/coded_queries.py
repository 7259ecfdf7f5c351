"""Queries, for the kernel over codes: an operand for each place in a word, and the scores of a block.

Columns of a product are [HIGH, rows, LOW]: copies of every row, of which each meets one group of
channels, two side by side because one thread holds two columns and can add them up alone.
"""

# ruff: noqa: N803, N806, RUF005  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.bits import numbers, scale


@triton.jit
@no_type_check
def asked(
    q, channels, valid, KEYS: tl.constexpr, BOOST: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """(Operands of the queries, their sums over each group, a power of 2 that both lack).

    An operand is [tiles · warps, words of a tile, columns] and `BOOST` times as large, the sums are
    [tiles, 1, 1, HIGH, rows, LOW], of one group [1, 1, rows].

    Args:
        q: pointers at each row.
        channels: factors, or None.
        valid: which rows there are.
    """
    HALF: tl.constexpr = KEYS.half
    TILES: tl.constexpr = KEYS.tiles
    WORDS: tl.constexpr = KEYS.words
    HIGH: tl.constexpr = KEYS.high
    LOW: tl.constexpr = KEYS.low
    EACH: tl.constexpr = KEYS.each
    ROWS: tl.constexpr = q.shape[0]
    q, valid = q[None, None, :], valid[None, None, :]
    w = tl.arange(0, TILES)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    found, top = (), tl.zeros([TILES, WORDS, ROWS], tl.float32)
    for place in tl.static_range(EACH):
        d = w[:, :, None] * EACH + place
        x = tl.load(q + d, mask=valid & (d < KEYS.dim), other=0.0).to(tl.float32)
        if channels is not None:
            x *= tl.load(channels + d, mask=d < KEYS.dim, other=0.0)
        found, top = found + (x,), tl.maximum(top, tl.abs(x))
    unit = _power_below(tl.max(tl.max(tl.max(top, 2), 1), 0)) if HALF else 1.0
    operands, sums = (), tl.zeros([TILES, HIGH, ROWS, LOW], tl.float32)
    for place in tl.static_range(EACH):
        x = (found[place] / unit)[:, :, None, :, None]
        x = tl.where(own(w * EACH + place, KEYS), x, 0.0)
        sums += tl.sum(x, 1)
        x = (x * (BOOST * scale(place, EACH, HALF))).to(tl.float16 if HALF else tl.float32)
        x = tl.broadcast_to(x[:, None], [TILES, WARPS, WORDS, HIGH, ROWS, LOW])
        operands = operands + (tl.reshape(x, [TILES * WARPS, WORDS, HIGH * ROWS * LOW]),)
    if KEYS.groups == 1:
        sums = tl.sum(tl.sum(tl.sum(sums, 3), 1), 0)[None, None, :]
    else:
        sums = sums[:, None, None]
    return operands, sums, unit


@triton.jit
@no_type_check
def scores_of(words, more, steps, question, KEYS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Scores of a block, [warps, slots, rows], in the units of the operands.

    Args:
        words: of the block, [tiles · warps, slots, words of a tile].
        more: of 3 bits, the upper ones.
        steps: (steps, zeros).
        question: (operands, sums of the queries over each group in their units).
        KEYS: how the keys are held.
        ASSEMBLY: whether Triton compiles, and does not interpret.
    """
    operands, sums = question
    step, zero = steps
    HALF: tl.constexpr = KEYS.half
    EACH: tl.constexpr = KEYS.each
    PRECISION: tl.constexpr = "tf32" if HALF else "tf32x3"
    codes = numbers(words, more, KEYS.bits, EACH, HALF, ASSEMBLY)
    scores = tl.zeros([words.shape[0], words.shape[1], operands[0].shape[2]], tl.float32)
    stepped = ()
    for i in tl.static_range(EACH):
        x = operands[i]
        if KEYS.tokens > 1:
            x = (x * step[i][:, :, None]).to(x.dtype)
        stepped = stepped + (x,)
    for i in tl.static_range(EACH):
        scores = tl.dot(codes[i], stepped[i], scores, input_precision=PRECISION)
    if KEYS.tokens > 1:
        scores += _constant(operands, zero, KEYS)[:, None, :]
    TILES: tl.constexpr = KEYS.tiles
    HIGH: tl.constexpr = KEYS.high
    LOW: tl.constexpr = KEYS.low
    WARPS: tl.constexpr = words.shape[0] // TILES
    ROWS: tl.constexpr = operands[0].shape[2] // KEYS.copies
    scores = tl.reshape(scores, [TILES, WARPS, words.shape[1], HIGH, ROWS, LOW])
    if KEYS.groups > 1:
        scores = scores * by_column(step.to(tl.float32), KEYS)
        scores += sums * by_column(zero.to(tl.float32), KEYS)
    scores = tl.sum(tl.sum(tl.sum(scores, 5), 3), 0)
    if KEYS.narrow:
        scores = scores * step.to(tl.float32)[:, :, None] + sums * zero.to(tl.float32)[:, :, None]
    return scores


@triton.jit
@no_type_check
def _constant(operands, zeros, KEYS: tl.constexpr):
    """Σ_d q_d zero_d of zeros that tokens share, for each warp and column: [warps, columns]."""
    EACH: tl.constexpr = KEYS.each
    LOST: tl.constexpr = 2.0**-24 if KEYS.half else 1.0
    FAST: tl.constexpr = KEYS.half and zeros[0].dtype == tl.float16
    ALIKE: tl.constexpr = 16 if FAST else 1
    first = operands[0]
    constant = tl.zeros([first.shape[0], ALIKE, first.shape[2]], tl.float32)
    for i in tl.static_range(EACH):
        x, zero = operands[i], zeros[i]
        if FAST:  # rows alike, as few as a product has
            found = tl.dot(tl.broadcast_to(zero[:, None, :], [x.shape[0], 16, x.shape[1]]), x)
        else:
            found = tl.sum(x.to(tl.float32) * zero.to(tl.float32)[:, :, None], 1)[:, None, :]
        constant += found * (LOST / scale(i, EACH, KEYS.half))
    return tl.max(constant, 1)


@triton.jit
@no_type_check
def _power_below(x):
    """The power of 2 that is at most x, or 1 where it is 0."""
    unit = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(unit > 0.0, unit, 1.0)


@triton.jit
@no_type_check
def own(d, SIDE: tl.constexpr):
    """Whether channels d [tiles, words] are of a copy's group: [tiles, words, HIGH, 1, LOW]."""
    TILES: tl.constexpr = SIDE.tiles
    HIGH: tl.constexpr = SIDE.high
    LOW: tl.constexpr = SIDE.low
    group = tl.reshape(tl.arange(0, SIDE.tiles * SIDE.copies), [TILES, 1, HIGH, 1, LOW])
    return (d // (SIDE.dim // SIDE.groups))[:, :, None, None, None] == group


@triton.jit
@no_type_check
def by_column(x, SIDE: tl.constexpr):
    """x [warps, slots, tiles · copies] as [tiles, warps, slots, HIGH, 1, LOW]."""
    TILES: tl.constexpr = SIDE.tiles
    HIGH: tl.constexpr = SIDE.high
    LOW: tl.constexpr = SIDE.low
    x = tl.reshape(x, [x.shape[0], x.shape[1], TILES, HIGH, LOW])
    return tl.permute(x, (2, 0, 1, 3, 4))[:, :, :, :, None, :]
