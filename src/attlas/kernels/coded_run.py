"""A few queries attend to keys and values in few bits, which never become numbers in memory.

    s_r = q_r · ((code_n · step + zero) · channel) · scale      r = query row, n = slot
    out_r = Σ_n softmax(s_r)_n v_n                              lse_r = log₂ Σ_n 2^(s_r log₂ e)

Products are linear, so what belongs to a group is taken out of the sum over codes:

    keys, per token       step_n (q · code_n) + zero_n Σ_d q_d
    keys, per channel     (q step) · code_n + Σ_d q_d zero_d
    values, per token     Σ_n (p_n step_n) code_n + Σ_n p_n zero_n
    values, per channel   step (Σ_n p_n code_n) + zero Σ_n p_n

Slots are the rows of the tensor cores' products and queries their 8 columns, so that codes, of which
there are many, fill them: scoresᵀ = codes qᵀ and outᵀ = codesᵀ pᵀ. Every warp has slots of its own, and
its own maximum and sums, until the end of the run: none waits for another.

Several groups of channels have columns of their own. Words are cut into tiles as far as a tile has 16
words and 8 columns; the groups that meet in a tile have copies of each query, of which each keeps what
is its own. `attlas.kernels.bits` says how codes become operands.

Queries of 16 bits, brought near 1 by a power of 2, and weights meet the codes in float16, whatever type
the queries had; sums are float32.

Cost: codes, steps and zeros are read once; 2 · runs · rows · v_dim float32 written and read between.
"""

# ruff: noqa: N803, N806, RUF005  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.bits import numbers, scale, whole
from attlas.kernels.coded_queries import asked, by_column, own
from attlas.kernels.coded_read import codes_of, places_of, slots_of, steps_of

#: What changes from step to step, for which nothing is compiled anew.
_VARYING = [
    "heads", "queries", "slots", "listed", "lists", "blocks", "runs", "first", "all_runs",
    "q_b", "q_h", "q_q", "k_b", "k_h", "k_step_b", "k_step_h", "v_b", "v_h", "v_step_b", "v_step_h",
    "index_b", "index_h",
]  # fmt: skip


@triton.jit
@no_type_check
def _scores(words, more, steps, question, KEYS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Scores of a block, [warps, slots, rows], in units that the queries were brought to."""
    operands, sums = question
    step, zero = steps
    HALF: tl.constexpr = KEYS.half
    EACH: tl.constexpr = KEYS.each
    PRECISION: tl.constexpr = "tf32" if HALF else "tf32x3"
    codes = numbers(words, more, KEYS.bits, EACH, HALF, ASSEMBLY)
    scores = tl.zeros([words.shape[0], words.shape[1], operands[0].shape[2]], tl.float32)
    for i in tl.static_range(EACH):
        x = operands[i]
        if KEYS.tokens > 1:
            x = (x * step[i][:, :, None]).to(x.dtype)
        scores = tl.dot(codes[i], x, scores, input_precision=PRECISION)
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
def _partly(x, AXIS: tl.constexpr):
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
def _levelled(level, p, shrink, zero, VALUES: tl.constexpr):
    """Σ_n p_n zero_n with a block's: [warps, 8, rows], of groups [tiles, warps, 8, HIGH, rows, LOW]."""
    zero = zero.to(tl.float32)
    if VALUES.groups == 1:
        level = level * shrink[:, None, :] + _partly(p * zero[:, :, None], 1)
    else:
        added = p[None, :, :, None, :, None] * by_column(zero, VALUES)
        level = level * shrink[None, :, None, None, :, None] + _partly(added, 2)
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
def _added(summed, words, more, p, shrink, steps, VALUES: tl.constexpr, ASSEMBLY: tl.constexpr):
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
def _means(summed, level, VALUES: tl.constexpr):
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


@triton.jit(do_not_specialize=_VARYING)
@no_type_check
def over_a_run(
    q, k, k_more, k_step, k_zero, k_channel, v, v_more, v_step, v_zero, v_channel,
    lengths, index, sums, lses, factor,
    heads, queries, slots, listed, lists, blocks, runs, first, all_runs,
    q_b, q_h, q_q, k_b, k_h, k_step_b, k_step_h, v_b, v_h, v_step_b, v_step_h, index_b, index_h,
    KEYS: tl.constexpr, VALUES: tl.constexpr, BOOST: tl.constexpr, MORE: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, SLOTS: tl.constexpr, PAGE: tl.constexpr,
    EVEN: tl.constexpr, EVEN_STEPS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Mean of the values and log₂-sum-exp₂ of the scores, of the heads of one list over one run."""
    LOST: tl.constexpr = 2.0**24 if KEYS.half else 1.0
    EACH: tl.constexpr = VALUES.each
    TILES: tl.constexpr = VALUES.tiles
    WORDS: tl.constexpr = VALUES.words
    HIGH: tl.constexpr = VALUES.high
    LOW: tl.constexpr = VALUES.low
    place, batch = tl.program_id(0) // blocks, tl.program_id(2).to(tl.int64)
    places = tl.num_programs(0) // blocks
    kv_head = (place // lists).to(tl.int64)
    spot = batch * (places // lists) + kv_head
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    valid = row < heads // places * queries
    head, query = place * (heads // places) + row // queries, row % queries

    held = slots
    if lengths is not None:
        held = tl.minimum(tl.load(lengths + spot).to(tl.int32), slots)
    end = held
    if PAGE > 0:
        index += batch * index_b + place.to(tl.int64) * index_h
        end = listed
    k_at, v_at = batch * k_b + kv_head * k_h, batch * v_b + kv_head * v_h
    ks_at, vs_at = batch * k_step_b + kv_head * k_step_h, batch * v_step_b + kv_head * v_step_h
    if EVEN:
        k_at, v_at = tl.multiple_of(k_at, 8), tl.multiple_of(v_at, 8)
    if EVEN_STEPS:
        ks_at, vs_at = tl.multiple_of(ks_at, 4), tl.multiple_of(vs_at, 4)
    k, k_more, k_step, k_zero = k + k_at, k_more + k_at, k_step + ks_at, k_zero + ks_at
    v, v_more, v_step, v_zero = v + v_at, v_more + v_at, v_step + vs_at, v_zero + vs_at
    if k_channel is not None:
        k_channel += spot * KEYS.dim
    q += batch * q_b + head.to(tl.int64) * q_h + query * q_q
    operands, asked_sums, unit = asked(q, k_channel, valid, KEYS, BOOST, WARPS)
    question = (operands, asked_sums / LOST)
    factor *= unit * LOST / BOOST

    top = tl.full([WARPS, ROWS], float("-inf"), tl.float32)
    # Sums over slots are kept by place in the block, and added up at the end.
    total = tl.zeros([WARPS, 8, ROWS], tl.float32)
    level = total
    if VALUES.groups > 1:
        level = tl.zeros([TILES, WARPS, 8, HIGH, ROWS, LOW], tl.float32)
    summed = ()
    for _ in tl.static_range(EACH):
        summed = summed + (tl.zeros([TILES * WARPS, WORDS, HIGH * ROWS * LOW], tl.float32),)
    KEPT: tl.constexpr = WARPS * SLOTS
    run = tl.cdiv(tl.cdiv(end, runs), KEPT) * KEPT
    begin = tl.program_id(1) * run
    block = (index, begin, end, held)
    k_next, v_next = (0.0, 0.0), (0.0, 0.0)
    if KEYS.narrow:
        k_next = steps_of(k_step, k_zero, block, KEYS, WARPS, SLOTS, PAGE)
    if VALUES.narrow:
        v_next = steps_of(v_step, v_zero, block, VALUES, WARPS, SLOTS, PAGE)
    for start in range(begin, tl.minimum(begin + run, end), KEPT):
        block, after = (index, start, end, held), (index, start + KEPT, end, held)
        inside = slots_of(block, places_of(WARPS, SLOTS), PAGE)[2]
        if KEYS.narrow:
            k_steps, k_next = k_next, steps_of(k_step, k_zero, after, KEYS, WARPS, SLOTS, PAGE)
        else:
            k_steps = steps_of(k_step, k_zero, block, KEYS, WARPS, SLOTS, PAGE)
        if VALUES.narrow:
            v_steps, v_next = v_next, steps_of(v_step, v_zero, after, VALUES, WARPS, SLOTS, PAGE)
        else:
            v_steps = steps_of(v_step, v_zero, block, VALUES, WARPS, SLOTS, PAGE)
        words, more = codes_of(k, k_more, block, KEYS, WARPS, SLOTS, PAGE, False)
        scores = _scores(words, more, k_steps, question, KEYS, ASSEMBLY) * factor
        scores = tl.where(inside[:, :, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        p, shrink = tl.exp2(scores - (floor - MORE)[:, None, :]), tl.exp2(top - floor)
        top = higher
        total = total * shrink[:, None, :] + _partly(p, 1)
        if VALUES.tokens == 1:
            level = _levelled(level, p, shrink, v_steps[1], VALUES)
        words, more = codes_of(v, v_more, block, VALUES, WARPS, SLOTS, PAGE, True)
        summed = _added(summed, words, more, p, shrink, v_steps, VALUES, ASSEMBLY)

    highest = tl.max(top, 0)
    share = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
    weight = tl.sum(tl.sum(total, 1) * share, 0)
    into = (batch * all_runs + first + tl.program_id(1)) * heads * queries + head * queries + query
    tl.store(lses + into, highest + tl.log2(weight) - MORE, mask=valid)
    mean = tl.sum(_means(summed, level, VALUES) * share[None, :, None, :, None], 1)
    mean /= tl.where(weight == 0.0, 1.0, weight)[None, None, :, None]
    w = tl.arange(0, TILES)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    d = (w[:, :, None] * EACH + tl.arange(0, EACH)[None, None, :])[:, :, None, :]
    there = d < VALUES.dim
    if v_channel is not None:
        mean *= tl.load(v_channel + spot * VALUES.dim + d, mask=there, other=0.0)
    at = sums + (into * VALUES.dim)[None, None, :, None] + d
    tl.store(at, mean, mask=valid[None, None, :, None] & there)
