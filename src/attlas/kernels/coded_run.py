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

from attlas.kernels.coded_queries import asked, scores_of
from attlas.kernels.coded_read import codes_of, places_of, slots_of, steps_of
from attlas.kernels.coded_values import added, levelled, means, partly

#: What changes from step to step, for which nothing is compiled anew.
_VARYING = [
    "heads", "queries", "slots", "listed", "lists", "blocks", "runs", "first", "all_runs",
    "q_b", "q_h", "q_q", "k_b", "k_h", "k_step_b", "k_step_h", "v_b", "v_h", "v_step_b", "v_step_h",
    "index_b", "index_h",
]  # fmt: skip


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
        scores = scores_of(words, more, k_steps, question, KEYS, ASSEMBLY) * factor
        scores = tl.where(inside[:, :, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        p, shrink = tl.exp2(scores - (floor - MORE)[:, None, :]), tl.exp2(top - floor)
        top = higher
        total = total * shrink[:, None, :] + partly(p, 1)
        if VALUES.tokens == 1:
            level = levelled(level, p, shrink, v_steps[1], VALUES)
        words, more = codes_of(v, v_more, block, VALUES, WARPS, SLOTS, PAGE, True)
        summed = added(summed, words, more, p, shrink, v_steps, VALUES, ASSEMBLY)

    highest = tl.max(top, 0)
    share = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
    weight = tl.sum(tl.sum(total, 1) * share, 0)
    into = (batch * all_runs + first + tl.program_id(1)) * heads * queries + head * queries + query
    tl.store(lses + into, highest + tl.log2(weight) - MORE, mask=valid)
    mean = tl.sum(means(summed, level, VALUES) * share[None, :, None, :, None], 1)
    mean /= tl.where(weight == 0.0, 1.0, weight)[None, None, :, None]
    w = tl.arange(0, TILES)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    d = (w[:, :, None] * EACH + tl.arange(0, EACH)[None, None, :])[:, :, None, :]
    there = d < VALUES.dim
    if v_channel is not None:
        mean *= tl.load(v_channel + spot * VALUES.dim + d, mask=there, other=0.0)
    at = sums + (into * VALUES.dim)[None, None, :, None] + d
    tl.store(at, mean, mask=valid[None, None, :, None] & there)
