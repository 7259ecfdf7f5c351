"""A few queries attend to keys and values in few bits, which never become numbers in memory.

    s_r = q_r · ((code_n · step + zero) · channel) · scale      r = query row, n = slot
    out_r = Σ_n softmax(s_r)_n v_n                              lse_r = log₂ Σ_n 2^(s_r log₂ e)

Products are linear, so what belongs to a group is taken out of the sum over codes:

    keys, per token       step_n (q · code_n) + zero_n Σ_d q_d
    keys, per channel     (q step) · code_n + Σ_d q_d zero_d
    values, per token     Σ_n (p_n step_n) code_n + Σ_n p_n zero_n
    values, per channel   step (Σ_n p_n code_n) + zero Σ_n p_n

With several groups of channels, or of tokens in a block, each has rows of its own: tensor cores take 16
rows where a token's queries are 4. Codes of 4 groups meet 4 copies of 4 queries, of which each keeps
what is its own, at no cost. `attlas.kernels.bits` says how codes become operands.

Queries of 16 bits, brought near 1 by a power of 2, and weights meet the codes in float16, whatever type
the queries had; sums are float32.

Cost: codes, steps and zeros are read once; 2 · runs · rows · v_dim float32 written and read between.
"""

# ruff: noqa: N803, N806, RUF005  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.bits import alternate, numbers, parts, scale, whole

#: What changes from step to step, for which nothing is compiled anew.
_VARYING = [
    "heads", "queries", "slots", "listed", "lists", "blocks", "runs", "first", "all_runs",
    "q_b", "q_h", "q_q", "k_b", "k_h", "k_step_b", "k_step_h", "v_b", "v_h", "v_step_b", "v_step_h",
    "index_b", "index_h",
]  # fmt: skip


@triton.jit
@no_type_check
def _slots(index, start, n, end, held, PAGE: tl.constexpr):
    """(The slots at places `start` + n, of the list if there is one, whether each is there)."""
    inside = n < end - start
    slot = start + n
    if PAGE > 0:
        page = tl.load(index + slot // PAGE, mask=inside, other=-1).to(tl.int32)
        slot = page * PAGE + slot % PAGE
        inside = (page >= 0) & (slot < held)
    return slot.to(tl.int64), inside


@triton.jit
@no_type_check
def _steps(
    step, zero, step_n, index, start, end, held,
    DIM: tl.constexpr, ROOM: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr,
    UNIT: tl.constexpr, COPIES: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Steps and zeros of a block: [groups, slots], or [runs of `UNIT` slots, channels]."""
    copy = tl.arange(0, COPIES)
    if TOKENS == 1:
        slot, inside = _slots(index, start, tl.arange(0, KEYS), end, held, PAGE)
        at, mask = (slot * step_n)[None, :], inside[None, :]
        if GROUPS > 1:
            at, mask = at + copy[:, None], mask & (copy < GROUPS)[:, None]
    else:
        slot, inside = _slots(index, start, copy * UNIT, end, held, PAGE)
        d = tl.arange(0, ROOM)
        at = (slot // TOKENS)[:, None] * step_n + d[None, :]
        mask = (inside & (copy * UNIT < KEYS))[:, None] & (d < DIM)[None, :]
    return tl.load(step + at, mask=mask, other=0.0), tl.load(zero + at, mask=mask, other=0.0)


@triton.jit
@no_type_check
def _read(
    data, at, inside, DIM: tl.constexpr, ROOM: tl.constexpr, EACH: tl.constexpr, TWICE: tl.constexpr
):  # fmt: skip
    """Words of `EACH` codes of some slots, [slots, words]; `TWICE`: every one for two places."""
    w = tl.arange(0, ROOM // EACH)
    mask = inside[:, None]
    if DIM < ROOM:
        mask = mask & (w < DIM // EACH)[None, :]
    place = w // 2 if TWICE else w
    return tl.load(data + at[:, None] + place[None, :], mask=mask, other=0)


@triton.jit
@no_type_check
def _words(
    data, more, at, inside, DIM: tl.constexpr, ROOM: tl.constexpr,
    WIDTH: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Codes of some slots, and of 3 bits the other plane."""
    if WIDTH == 3:
        words = _read(data, at, inside, DIM, ROOM, 4, False)
        if ROOM >= 128:
            byte = _read(more, at, inside, DIM, ROOM, 8, False)
            other = alternate(byte, byte >> 4)
        else:  # Triton 3.6 compiles so narrow a join wrongly, though its interpreter does not.
            half = (tl.arange(0, ROOM // 4) % 2 * 4).to(tl.uint8)
            other = _read(more, at, inside, DIM, ROOM, 4, True) >> half[None, :]
    else:
        words = _read(data, at, inside, DIM, ROOM, WORD // WIDTH, False)
        other = words
    return words, other


@triton.jit
@no_type_check
def _asked(x, WIDTH: tl.constexpr, WORD: tl.constexpr, HALF: tl.constexpr):
    """Queries [copies, rows, room], scaled for their place, as operands."""
    x = tl.reshape(x, [x.shape[0] * x.shape[1], x.shape[2]])
    x = x.to(tl.float16 if HALF else tl.float32)
    return parts(x, 4 if WIDTH == 3 else WORD // WIDTH)


@triton.jit
@no_type_check
def _nothing(ROWS: tl.constexpr, ROOM: tl.constexpr, EACH: tl.constexpr):
    nothing = ()
    for _ in tl.static_range(EACH):
        nothing = nothing + (tl.zeros([ROWS, ROOM // EACH], tl.float32),)
    return nothing


@triton.jit
@no_type_check
def _copied(x, COPIES: tl.constexpr):
    """x behind itself so often."""
    return tl.reshape(tl.broadcast_to(x[None, :], [COPIES, x.shape[0]]), [COPIES * x.shape[0]])


@triton.jit
@no_type_check
def _unit(x):
    """The power of 2 that is at most the largest size in x, or 1 where all is 0."""
    top = tl.max(tl.max(tl.abs(x), 1), 0)
    unit = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(unit > 0.0, unit, 1.0)


@triton.jit(do_not_specialize=_VARYING)
@no_type_check
def over_a_run(
    q, k, k_more, k_step, k_zero, k_channel, v, v_more, v_step, v_zero, v_channel,
    lengths, index, sums, lses, factor,
    heads, queries, slots, listed, lists, blocks, runs, first, all_runs,
    q_b, q_h, q_q, k_b, k_h, k_n: tl.constexpr, k_step_b, k_step_h, k_step_n,
    v_b, v_h, v_n: tl.constexpr, v_step_b, v_step_h, v_step_n, index_b, index_h,
    K_DIM: tl.constexpr, K_ROOM: tl.constexpr, V_DIM: tl.constexpr, V_ROOM: tl.constexpr,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, K_WORD: tl.constexpr, V_WORD: tl.constexpr,
    K_TOKENS: tl.constexpr, V_TOKENS: tl.constexpr, K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr,
    K_UNIT: tl.constexpr, V_UNIT: tl.constexpr, COPIES: tl.constexpr, LOST: tl.constexpr,
    K_BOOST: tl.constexpr, V_BOOST: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr,
    EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Mean of the values and log₂-sum-exp₂ of the scores, of the heads of one list over one run."""
    TYPE: tl.constexpr = tl.float16 if HALF else tl.float32
    PRECISION: tl.constexpr = "tf32" if HALF else "tf32x3"
    V_EACH: tl.constexpr = 4 if V_WIDTH == 3 else V_WORD // V_WIDTH
    place, batch = tl.program_id(0) // blocks, tl.program_id(2).to(tl.int64)
    places = tl.num_programs(0) // blocks
    kv_head = (place // lists).to(tl.int64)
    spot = batch * (places // lists) + kv_head
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    valid = row < heads // places * queries
    head, query = place * (heads // places) + row // queries, row % queries
    c, d, n = tl.arange(0, K_ROOM), tl.arange(0, V_ROOM), tl.arange(0, KEYS)
    copy = tl.arange(0, COPIES)
    asked = tl.load(
        (q + batch * q_b + head.to(tl.int64) * q_h + query * q_q)[:, None] + c[None, :],
        mask=valid[:, None] & (c < K_DIM)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    if k_channel is not None:
        asked *= tl.load(k_channel + spot * K_DIM + c, mask=c < K_DIM, other=0.0)[None, :]
    if HALF:
        unit = _unit(asked)
        asked, factor = asked / unit, factor * unit
    placed = asked * scale(c, K_WIDTH, K_WORD, HALF)[None, :]

    held = slots
    if lengths is not None:
        held = tl.minimum(tl.load(lengths + spot).to(tl.int32), slots)
    end = held
    if PAGE > 0:
        index += batch * index_b + place.to(tl.int64) * index_h
        end = listed
    k_at, v_at = batch * k_b + kv_head * k_h, batch * v_b + kv_head * v_h
    if EVEN:
        k_at, v_at = tl.multiple_of(k_at, 128 // K_WORD), tl.multiple_of(v_at, 128 // V_WORD)
    k, v, k_more, v_more = k + k_at, v + v_at, k_more + k_at, v_more + v_at
    k_at, v_at = batch * k_step_b + kv_head * k_step_h, batch * v_step_b + kv_head * v_step_h
    k_step, k_zero, v_step, v_zero = k_step + k_at, k_zero + k_at, v_step + v_at, v_zero + v_at

    if K_TOKENS == 1:  # each copy of q keeps the channels of one group
        mine = ((c // (K_DIM // K_GROUPS))[None, :] == copy[:, None])[:, None, :]
        k_parts = _asked(tl.where(mine, placed[None, :, :], 0.0), K_WIDTH, K_WORD, HALF)
        asked_sum = tl.sum(tl.where(mine, asked[None, :, :], 0.0), 2)
    else:
        k_mine = (n // K_UNIT)[None, :] == copy[:, None]
        placed *= K_BOOST
    if V_TOKENS > 1:
        v_mine = (n // V_UNIT)[None, :] == copy[:, None]

    top = tl.full([ROWS], float("-inf"), tl.float32)
    # Sums over slots are kept by place in the block, and added up at the end.
    total = tl.zeros([ROWS, KEYS], tl.float32)
    if V_TOKENS == 1:
        level = tl.zeros([COPIES if V_GROUPS > 1 else 1, ROWS, KEYS], tl.float32)
    else:
        level = tl.zeros([COPIES * ROWS, V_ROOM], tl.float32)
    summed = _nothing(COPIES * ROWS, V_ROOM, V_EACH)
    run = tl.cdiv(tl.cdiv(end, runs), KEYS) * KEYS
    begin = tl.program_id(1) * run
    k_next = _steps(
        k_step, k_zero, k_step_n, index, begin, end, held,
        K_DIM, K_ROOM, K_TOKENS, K_GROUPS, K_UNIT, COPIES, KEYS, PAGE,
    )  # fmt: skip
    v_next = _steps(
        v_step, v_zero, v_step_n, index, begin, end, held,
        V_DIM, V_ROOM, V_TOKENS, V_GROUPS, V_UNIT, COPIES, KEYS, PAGE,
    )  # fmt: skip
    for start in range(begin, tl.minimum(begin + run, end), KEYS):
        # Triton loads codes ahead of their use, but nothing so narrow as steps.
        step, zero = k_next[0].to(tl.float32), k_next[1].to(tl.float32)
        v_steps, v_zeros = v_next[0].to(tl.float32), v_next[1].to(tl.float32)
        if not HALF:  # whose codes count from the middle
            zero += step * (((1 << K_WIDTH) - 1) / 2)
            v_zeros += v_steps * (((1 << V_WIDTH) - 1) / 2)
        k_next = _steps(
            k_step, k_zero, k_step_n, index, start + KEYS, end, held,
            K_DIM, K_ROOM, K_TOKENS, K_GROUPS, K_UNIT, COPIES, KEYS, PAGE,
        )  # fmt: skip
        v_next = _steps(
            v_step, v_zero, v_step_n, index, start + KEYS, end, held,
            V_DIM, V_ROOM, V_TOKENS, V_GROUPS, V_UNIT, COPIES, KEYS, PAGE,
        )  # fmt: skip
        slot, inside = _slots(index, start, n, end, held, PAGE)
        if K_TOKENS > 1:
            k_parts = _asked(placed[None, :, :] * step[:, None, :], K_WIDTH, K_WORD, HALF)
            constant = tl.sum(asked[None, :, :] * zero[:, None, :], 2) * factor
        words, more = _words(k, k_more, slot * k_n, inside, K_DIM, K_ROOM, K_WIDTH, K_WORD)
        codes = numbers(tl.trans(words), tl.trans(more), K_WIDTH, K_WORD, HALF, ASSEMBLY)
        scores = tl.zeros([COPIES * ROWS, KEYS], tl.float32)
        for i in tl.static_range(len(codes)):
            scores = tl.dot(k_parts[i], codes[i], scores, input_precision=PRECISION)
        scores = tl.reshape(scores, [COPIES, ROWS, KEYS])
        if K_TOKENS == 1:
            step, zero = step * (factor * LOST), zero * factor
            scores = scores * step[:, None, :] + asked_sum[:, :, None] * zero[:, None, :]
        else:
            scores = scores * (factor * LOST / K_BOOST) + constant[:, :, None]
            scores = tl.where(k_mine[:, None, :], scores, 0.0)
        scores = tl.where(inside[None, :], tl.sum(scores, 0), float("-inf"))

        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - floor[:, None])
        shrink = tl.exp2(top - floor)
        shrinks = _copied(shrink, COPIES)
        total = total * shrink[:, None] + p
        top = higher
        if V_TOKENS == 1:
            weights = (p[None, :, :] * (v_steps * V_BOOST)[:, None, :]).to(TYPE)
            weights = tl.broadcast_to(weights, [COPIES, ROWS, KEYS])
            level = level * shrink[None, :, None] + p[None, :, :] * v_zeros[:, None, :]
        else:
            shares = tl.where(v_mine[:, None, :], p[None, :, :], 0.0)
            weights = shares.to(TYPE)
            added = tl.sum(shares, 2)[:, :, None] * v_zeros[:, None, :]
            level = level * shrinks[:, None] + tl.reshape(added, [COPIES * ROWS, V_ROOM])
            v_steps = tl.broadcast_to(v_steps[:, None, :], [COPIES, ROWS, V_ROOM])
            v_steps = parts(tl.reshape(v_steps, [COPIES * ROWS, V_ROOM]), V_EACH)
        weights = tl.reshape(weights, [COPIES * ROWS, KEYS])
        words, more = _words(v, v_more, slot * v_n, inside, V_DIM, V_ROOM, V_WIDTH, V_WORD)
        codes = numbers(words, more, V_WIDTH, V_WORD, HALF, ASSEMBLY)
        shrunk = ()
        for i in tl.static_range(V_EACH):
            kept = summed[i] * shrinks[:, None]
            if V_TOKENS == 1:
                shrunk = shrunk + (tl.dot(weights, codes[i], kept, input_precision=PRECISION),)
            else:
                met = tl.dot(weights, codes[i], input_precision=PRECISION)
                shrunk = shrunk + (kept + met * v_steps[i],)
        summed = shrunk

    mean = whole(summed, V_EACH) * (scale(d, V_WIDTH, V_WORD, HALF) * LOST)[None, :]
    if V_TOKENS == 1:
        mean = tl.reshape(mean / V_BOOST, [COPIES, ROWS, V_ROOM]) + tl.sum(level, 2)[:, :, None]
        mine = (d // (V_DIM // V_GROUPS))[None, :] == copy[:, None]
        mean = tl.where(mine[:, None, :], mean, 0.0)
    else:
        mean = tl.reshape(mean + level, [COPIES, ROWS, V_ROOM])
    weight = tl.sum(total, 1)
    mean = tl.sum(mean, 0) / tl.where(weight == 0.0, 1.0, weight)[:, None]
    if v_channel is not None:
        mean *= tl.load(v_channel + spot * V_DIM + d, mask=d < V_DIM, other=0.0)[None, :]
    into = (batch * all_runs + first + tl.program_id(1)) * heads * queries + head * queries + query
    tl.store(lses + into, top + tl.log2(weight), mask=valid)
    at = sums + into[:, None] * V_DIM + d[None, :]
    tl.store(at, mean, mask=valid[:, None] & (d < V_DIM)[None, :])
