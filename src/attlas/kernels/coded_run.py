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

from attlas.kernels.bits import numbers, scale
from attlas.kernels.coded_read import channel_steps, slots_of, token_steps, words_of

#: What changes from step to step, for which nothing is compiled anew.
_VARYING = [
    "heads", "queries", "slots", "listed", "lists", "blocks", "runs", "first", "all_runs",
    "q_b", "q_h", "q_q", "k_b", "k_h", "k_step_b", "k_step_h", "v_b", "v_h", "v_step_b", "v_step_h",
    "index_b", "index_h",
]  # fmt: skip


@triton.jit
@no_type_check
def _asked(
    q, channels, valid, DIM: tl.constexpr, ROOM: tl.constexpr, EACH: tl.constexpr,
    GROUPS: tl.constexpr, TILES: tl.constexpr, COPIES: tl.constexpr, WARPS: tl.constexpr,
    BOOST: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """(Operands of the queries, their sums over each group, a power of 2 that both lack).

    An operand is [tiles · warps, words of a tile, columns], a sum [tiles, 1, 1, HIGH, rows, LOW]. q
    [rows] points at each row; `channels` are factors.
    """
    ROWS: tl.constexpr = q.shape[0]
    LOW: tl.constexpr = min(2, COPIES)
    HIGH: tl.constexpr = COPIES // LOW
    WORDS: tl.constexpr = ROOM // EACH // TILES
    w = tl.arange(0, TILES)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    unit = 1.0
    if HALF:
        c = tl.arange(0, ROOM)
        every = tl.load(q[:, None] + c[None, :], mask=valid[:, None] & (c < DIM)[None, :], other=0.0)
        every = every.to(tl.float32)
        if channels is not None:
            every *= tl.load(channels + c, mask=c < DIM, other=0.0)[None, :]
        unit = _unit(every)
    operands = ()
    sums = tl.zeros([TILES, HIGH, ROWS, LOW], tl.float32)
    for place in tl.static_range(EACH):
        d = w * EACH + place
        mask = valid[None, None, :] & (d < DIM)[:, :, None]
        x = tl.load(q[None, None, :] + d[:, :, None], mask=mask, other=0.0).to(tl.float32) / unit
        if channels is not None:
            x *= tl.load(channels + d, mask=d < DIM, other=0.0)[:, :, None]
        x = tl.where(_own(d, DIM // GROUPS, COPIES), x[:, :, None, :, None], 0.0)
        sums += tl.sum(x, 1)
        x = (x * (BOOST * scale(place, EACH, HALF))).to(tl.float16 if HALF else tl.float32)
        x = tl.broadcast_to(x[:, None], [TILES, WARPS, WORDS, HIGH, ROWS, LOW])
        operands = operands + (tl.reshape(x, [TILES * WARPS, WORDS, ROWS * COPIES]),)
    return operands, sums[:, None, None], unit


@triton.jit
@no_type_check
def _own(d, WIDE: tl.constexpr, COPIES: tl.constexpr):
    """Whether a channel d [tiles, words] is of a copy's group: [tiles, words, HIGH, 1, LOW]."""
    LOW: tl.constexpr = min(2, COPIES)
    group = tl.arange(0, d.shape[0])[:, None] * COPIES + tl.arange(0, COPIES)[None, :]
    group = tl.reshape(group, [d.shape[0], 1, COPIES // LOW, 1, LOW])
    return (d // WIDE)[:, :, None, None, None] == group


@triton.jit
@no_type_check
def _unit(x):
    """The power of 2 that is at most the largest size in x, or 1 where all is 0."""
    top = tl.max(tl.max(tl.abs(x), 1), 0)
    unit = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(unit > 0.0, unit, 1.0)


@triton.jit
@no_type_check
def _by_column(x, TILES: tl.constexpr, COPIES: tl.constexpr):
    """x [warps, slots, all groups] as [tiles, warps, slots, HIGH, 1, LOW]."""
    LOW: tl.constexpr = min(2, COPIES)
    x = tl.reshape(x, [x.shape[0], x.shape[1], TILES, COPIES // LOW, LOW])
    return tl.permute(x, (2, 0, 1, 3, 4))[:, :, :, :, None, :]


@triton.jit
@no_type_check
def _together(x):
    """x [tiles, warps, slots, HIGH, rows, LOW] summed over tiles and copies."""
    return tl.sum(tl.sum(tl.sum(x, 5), 3), 0)


@triton.jit
@no_type_check
def _partly(x, AXIS: tl.constexpr):
    """x summed over its slots but for 8 places: over those that lie in one thread."""
    if AXIS == 1:
        found = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8, x.shape[2]]), 1)
    else:
        x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 8, 8, x.shape[3], x.shape[4], x.shape[5]])
        found = tl.sum(x, 2)
    return found


@triton.jit
@no_type_check
def _constant(
    asked, steps, zeros, EACH: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Σ_d q_d zero_d for each warp and column: [warps, columns]."""
    WARPS: tl.constexpr = asked[0].shape[0]
    WORDS: tl.constexpr = asked[0].shape[1]
    FAST: tl.constexpr = HALF and zeros[0].dtype == tl.float16
    constant = tl.zeros([WARPS, 16 if FAST else 1, asked[0].shape[2]], tl.float32)
    for place in tl.static_range(EACH):
        zero = zeros[place]
        if FAST:  # 16 rows alike
            found = tl.dot(tl.broadcast_to(zero[:, None, :], [WARPS, 16, WORDS]), asked[place])
        else:
            zero = zero.to(tl.float32)
            if not HALF:  # whose codes count from the middle
                zero += steps[place].to(tl.float32) * (((1 << WIDTH) - 1) / 2)
            found = tl.sum(asked[place].to(tl.float32) * zero[:, :, None], 1)[:, None, :]
        constant += found / scale(place, EACH, HALF)
    return tl.max(constant, 1)


@triton.jit(do_not_specialize=_VARYING)
@no_type_check
def over_a_run(
    q, k, k_more, k_step, k_zero, k_channel, v, v_more, v_step, v_zero, v_channel,
    lengths, index, sums, lses, factor,
    heads, queries, slots, listed, lists, blocks, runs, first, all_runs,
    q_b, q_h, q_q, k_b, k_h, k_n: tl.constexpr, k_step_b, k_step_h, k_step_n: tl.constexpr,
    v_b, v_h, v_n: tl.constexpr, v_step_b, v_step_h, v_step_n: tl.constexpr, index_b, index_h,
    K_DIM: tl.constexpr, K_ROOM: tl.constexpr, V_DIM: tl.constexpr, V_ROOM: tl.constexpr,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, K_EACH: tl.constexpr, V_EACH: tl.constexpr,
    K_TOKENS: tl.constexpr, V_TOKENS: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr,
    K_TILES: tl.constexpr, V_TILES: tl.constexpr, K_COPIES: tl.constexpr, V_COPIES: tl.constexpr,
    K_BOOST: tl.constexpr, V_MORE: tl.constexpr, LOST: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, SLOTS: tl.constexpr, PAGE: tl.constexpr,
    EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Mean of the values and log₂-sum-exp₂ of the scores, of the heads of one list over one run."""
    TYPE: tl.constexpr = tl.float16 if HALF else tl.float32
    PRECISION: tl.constexpr = "tf32" if HALF else "tf32x3"
    K_LOW: tl.constexpr = min(2, K_COPIES)
    V_LOW: tl.constexpr = min(2, V_COPIES)
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
        ks_at, vs_at = tl.multiple_of(ks_at, 4), tl.multiple_of(vs_at, 4)
    k, v, k_more, v_more = k + k_at, v + v_at, k_more + k_at, v_more + v_at
    k_step, k_zero, v_step, v_zero = k_step + ks_at, k_zero + ks_at, v_step + vs_at, v_zero + vs_at

    if k_channel is not None:
        k_channel += spot * K_DIM
    asked, asked_sum, unit = _asked(
        q + batch * q_b + head.to(tl.int64) * q_h + query * q_q, k_channel, valid, K_DIM, K_ROOM, K_EACH,
        K_GROUPS, K_TILES, K_COPIES, WARPS, K_BOOST, HALF,
    )  # fmt: skip
    asked_sum *= K_BOOST / LOST
    if K_GROUPS == 1:
        asked_sum = _together(asked_sum)
    factor *= unit * LOST / K_BOOST

    top = tl.full([WARPS, ROWS], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, 8, ROWS], tl.float32)
    if V_GROUPS == 1:
        level = tl.zeros([WARPS, 8, ROWS], tl.float32)
    else:
        level = tl.zeros([V_TILES, WARPS, 8, V_COPIES // V_LOW, ROWS, V_LOW], tl.float32)
    summed = ()
    for i in tl.static_range(V_EACH):
        nothing = tl.zeros([V_TILES * WARPS, V_ROOM // V_EACH // V_TILES, ROWS * V_COPIES], tl.float32)
        summed = summed + (nothing,)
    run = tl.cdiv(tl.cdiv(end, runs), WARPS * SLOTS) * (WARPS * SLOTS)
    begin = tl.program_id(1) * run
    n = tl.arange(0, WARPS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    for start in range(begin, tl.minimum(begin + run, end), WARPS * SLOTS):
        inside = slots_of(index, start, n, end, held, PAGE)[2]
        words, more = words_of(
            k, k_more, index, start, end, held, k_n, K_TILES, WARPS, SLOTS, K_DIM, K_ROOM, K_EACH,
            K_WIDTH, PAGE, False,
        )  # fmt: skip
        codes = numbers(words, more, K_WIDTH, K_EACH, HALF, ASSEMBLY)
        scores = tl.zeros([K_TILES * WARPS, SLOTS, ROWS * K_COPIES], tl.float32)
        if K_TOKENS == 1:
            for i in tl.static_range(K_EACH):
                scores = tl.dot(codes[i], asked[i], scores, input_precision=PRECISION)
            step = token_steps(
                k_step, index, start, end, held, k_step_n, WARPS, SLOTS, K_GROUPS, K_TILES * K_COPIES, PAGE
            ).to(tl.float32)  # fmt: skip
            zero = token_steps(
                k_zero, index, start, end, held, k_step_n, WARPS, SLOTS, K_GROUPS, K_TILES * K_COPIES, PAGE
            ).to(tl.float32)  # fmt: skip
            if not HALF:  # whose codes count from the middle
                zero += step * (((1 << K_WIDTH) - 1) / 2)
        else:
            steps = channel_steps(
                k_step, index, start, end, held, k_step_n, WARPS, SLOTS, K_DIM, K_ROOM, K_EACH, K_TOKENS, PAGE
            )  # fmt: skip
            zeros = channel_steps(
                k_zero, index, start, end, held, k_step_n, WARPS, SLOTS, K_DIM, K_ROOM, K_EACH, K_TOKENS, PAGE
            )  # fmt: skip
            for i in tl.static_range(K_EACH):
                stepped = (asked[i] * steps[i][:, :, None]).to(TYPE)
                scores = tl.dot(codes[i], stepped, scores, input_precision=PRECISION)
            constant = _constant(asked, steps, zeros, K_EACH, K_WIDTH, HALF) / LOST
            scores += constant[:, None, :]
        scores = tl.reshape(scores, [K_TILES, WARPS, SLOTS, K_COPIES // K_LOW, ROWS, K_LOW])
        if K_GROUPS > 1:
            scores = scores * _by_column(step, K_TILES, K_COPIES)
            scores = _together(scores + asked_sum * _by_column(zero, K_TILES, K_COPIES))
        elif K_TOKENS == 1:
            scores = _together(scores) * step[:, :, None] + asked_sum * zero[:, :, None]
        else:
            scores = _together(scores)
        scores = tl.where(inside[:, :, None], scores * factor, float("-inf"))

        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - (floor - V_MORE)[:, None, :])
        shrink = tl.exp2(top - floor)
        top = higher
        total = total * shrink[:, None, :] + _partly(p, 1)
        weights = p.to(TYPE)[None, :, :, None, :, None]
        shrinks = tl.broadcast_to(shrink[None, :, None, :, None], [V_TILES, WARPS, V_COPIES // V_LOW, ROWS, V_LOW])
        shrinks = tl.reshape(shrinks, [V_TILES * WARPS, 1, ROWS * V_COPIES])
        if V_TOKENS == 1:
            step = token_steps(
                v_step, index, start, end, held, v_step_n, WARPS, SLOTS, V_GROUPS, V_TILES * V_COPIES, PAGE
            )  # fmt: skip
            zero = token_steps(
                v_zero, index, start, end, held, v_step_n, WARPS, SLOTS, V_GROUPS, V_TILES * V_COPIES, PAGE
            ).to(tl.float32)  # fmt: skip
            if not HALF:
                zero += step.to(tl.float32) * (((1 << V_WIDTH) - 1) / 2)
            if V_GROUPS == 1:
                weights = (weights * step[None, :, :, None, None, None]).to(TYPE)
                level = level * shrink[:, None, :] + _partly(p * zero[:, :, None], 1)
            else:
                weights = (weights * _by_column(step, V_TILES, V_COPIES)).to(TYPE)
                added = p[None, :, :, None, :, None] * _by_column(zero, V_TILES, V_COPIES)
                level = level * shrink[None, :, None, None, :, None] + _partly(added, 2)
        else:
            steps = channel_steps(
                v_step, index, start, end, held, v_step_n, WARPS, SLOTS, V_DIM, V_ROOM, V_EACH, V_TOKENS, PAGE
            )  # fmt: skip
            zeros = channel_steps(
                v_zero, index, start, end, held, v_step_n, WARPS, SLOTS, V_DIM, V_ROOM, V_EACH, V_TOKENS, PAGE
            )  # fmt: skip
            share = tl.broadcast_to(tl.sum(p, 1)[:, None, :, None], [WARPS, V_COPIES // V_LOW, ROWS, V_LOW])
            share = tl.reshape(share, [WARPS, 1, ROWS * V_COPIES])
        weights = tl.broadcast_to(weights, [V_TILES, WARPS, SLOTS, V_COPIES // V_LOW, ROWS, V_LOW])
        weights = tl.reshape(weights, [V_TILES * WARPS, SLOTS, ROWS * V_COPIES])
        words, more = words_of(
            v, v_more, index, start, end, held, v_n, V_TILES, WARPS, SLOTS, V_DIM, V_ROOM, V_EACH,
            V_WIDTH, PAGE, True,
        )  # fmt: skip
        codes = numbers(words, more, V_WIDTH, V_EACH, HALF, ASSEMBLY)
        added_up = ()
        for i in tl.static_range(V_EACH):
            kept = summed[i] * shrinks
            if V_TOKENS == 1:
                kept = tl.dot(codes[i], weights, kept, input_precision=PRECISION)
            else:
                step = steps[i].to(tl.float32) * (LOST * scale(i, V_EACH, HALF))
                zero = zeros[i].to(tl.float32)
                if not HALF:
                    zero += step.to(tl.float32) * (((1 << V_WIDTH) - 1) / 2)
                kept += tl.dot(codes[i], weights, input_precision=PRECISION) * step[:, :, None]
                kept += share * zero[:, :, None]
            added_up = added_up + (kept,)
        summed = added_up

    highest = tl.max(top, 0)
    share = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
    weight = tl.sum(tl.sum(total, 1) * share, 0)
    if V_GROUPS == 1:
        level = tl.sum(tl.sum(level, 1) * share, 0)[None, None, :]
    else:
        level = tl.sum(tl.sum(level, 2) * share[None, :, None, :, None], 1)[:, None]
    into = (batch * all_runs + first + tl.program_id(1)) * heads * queries + head * queries + query
    tl.store(lses + into, highest + tl.log2(weight) - V_MORE, mask=valid)
    WORDS: tl.constexpr = V_ROOM // V_EACH // V_TILES
    w = tl.arange(0, V_TILES)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    for i in tl.static_range(V_EACH):
        d = w * V_EACH + i
        x = tl.reshape(summed[i], [V_TILES, WARPS, WORDS, V_COPIES // V_LOW, ROWS, V_LOW])
        x = tl.sum(x * share[None, :, None, None, :, None], 1)
        if V_TOKENS == 1:
            x *= scale(i, V_EACH, HALF) * LOST
        if V_GROUPS > 1:
            x += level
        x = tl.sum(tl.sum(tl.where(_own(d, V_DIM // V_GROUPS, V_COPIES), x, 0.0), 4), 2)
        if V_GROUPS == 1:
            x += level
        x /= tl.where(weight == 0.0, 1.0, weight)[None, None, :]
        if v_channel is not None:
            x *= tl.load(v_channel + spot * V_DIM + d, mask=d < V_DIM, other=0.0)[:, :, None]
        at = sums + into[None, None, :] * V_DIM + d[:, :, None]
        tl.store(at, x, mask=valid[None, None, :] & (d < V_DIM)[:, :, None])
