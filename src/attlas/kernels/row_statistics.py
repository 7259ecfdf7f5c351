"""Statistics of attention rows in one pass over keys, and what each key receives in one over queries.

    t_ij = q_i·k_j · scale · log₂ e        m' = max(m, max_j t_ij)        r = 2^(m − m')
    l' = r l + Σ_j 2^(t_ij − m')           a' = r (a + (m − m') l) + Σ_j 2^(t_ij − m') (t_ij − m')
    f' = r f + Σ_j 2^(t_ij − m') f_ij      for each mass, whose f_ij is made of positions and ids
    lse = (m + log₂ l) ln 2                entropy = (log₂ l − a / l) ln 2         mass = f / l

A program takes a block of queries and goes over all keys that they see: first the blocks that lie before
every query's previous token, where nothing is cut and nothing need be looked for at the diagonal, then
the others. Hidden pairs have a score that is low, but a number: their weight is 0, and so is its product
with their score. A row that has seen nothing yet counts them, until the first score shrinks that to 0.

    received_j = Σ_i 2^(t_ij − m_i) share_i / l_i

A program of the second kernel takes a block of keys and adds up over queries, always in the same order.

Cost: 2·n²·dim operations and some thirty a pair, half of both where causal; ten numbers a row written.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def _scores(
    rows, k, mask, key, row_at, row_in, last, keys, factor, low, k_n, mask_q, mask_n,
    DIM: tl.constexpr, DIM_ROOM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    CUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [rows, keys] in base 2, hidden pairs at `low`."""
    c = tl.arange(0, DIM_ROOM)
    at = k + key[:, None].to(tl.int64) * k_n + c[None, :]
    if CUT:
        columns = tl.load(at, mask=(key < keys)[:, None] & (c < DIM)[None, :], other=0.0)
    else:
        columns = tl.load(at, mask=(c < DIM)[None, :], other=0.0)
    scores = tl.dot(rows, tl.trans(columns), input_precision=PRECISION) * factor
    if CUT:
        seen = (key < keys)[None, :] & row_in[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= last[:, None])
        scores = tl.where(seen, scores, low)
    if MASK:
        pairs = row_in[:, None] & (key < keys)[None, :]
        at = mask + row_at[:, None].to(tl.int64) * mask_q + key[None, :].to(tl.int64) * mask_n
        scores = tl.where(tl.load(at, mask=pairs, other=0) != 0, scores, low)
    return scores


@triton.jit
@no_type_check
def _over_keys(
    rows, k, mask, own, coming, tokens, before, row_at, row_in, last, until, top, total, spread, first,
    itself, previous, distance, duplicate, induction, copying, peak_at, low_key, high_key, keys, factor,
    low, k_n, mask_q, mask_n,
    DIM: tl.constexpr, DIM_ROOM: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, IDS: tl.constexpr, PEAK: tl.constexpr, CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All sums after keys `low_key` to `high_key`; without CUT these end before any row's previous."""
    for start in range(low_key, high_key, KEYS):
        key = start + tl.arange(0, KEYS)
        scores = _scores(
            rows, k, mask, key, row_at, row_in, last, keys, factor, low, k_n, mask_q, mask_n,
            DIM, DIM_ROOM, CAUSAL, MASK, CUT, PRECISION,
        )  # fmt: skip
        highest = tl.max(scores, 1)
        if PEAK:
            found = tl.min(tl.where(scores == highest[:, None], key[None, :], 2147483647), 1)
            peak_at = tl.where(highest > top, found, peak_at)
        higher = tl.maximum(top, highest)
        under = scores - higher[:, None]
        weights = tl.exp2(under)
        shrink = tl.exp2(top - higher)
        here = tl.sum(weights, 1)
        spread = (spread + (top - higher) * total) * shrink + tl.sum(weights * under, 1)
        total = total * shrink + here
        first *= shrink
        if start < until:
            first += tl.sum(tl.where((key < until)[None, :], weights, 0.0), 1)
        if CUT:
            far = tl.abs(last[:, None] - key[None, :]).to(tl.float32)
            distance = distance * shrink + tl.sum(weights * far, 1)
            at_self = key[None, :] == last[:, None]
            itself = itself * shrink + tl.sum(tl.where(at_self, weights, 0.0), 1)
            at_previous = key[None, :] == last[:, None] - 1
            previous = previous * shrink + tl.sum(tl.where(at_previous, weights, 0.0), 1)
        else:
            inner = tl.sum(weights * tl.arange(0, KEYS).to(tl.float32)[None, :], 1)
            distance = distance * shrink + ((last - start).to(tl.float32) * here - inner)
        if IDS:
            token = tl.load(tokens + key, mask=key < keys, other=-1)
            behind = tl.load(before + key, mask=key < keys, other=-1)
            if CUT:
                weights = tl.where(key[None, :] <= last[:, None], weights, 0.0)
            like_coming = tl.where(token[None, :] == coming[:, None], weights, 0.0)
            copying = copying * shrink + tl.sum(like_coming, 1)
            after_own = tl.where(behind[None, :] == own[:, None], weights, 0.0)
            induction = induction * shrink + tl.sum(after_own, 1)
            if CUT:
                weights = tl.where(key[None, :] < last[:, None], weights, 0.0)
            like_own = tl.where(token[None, :] == own[:, None], weights, 0.0)
            duplicate = duplicate * shrink + tl.sum(like_own, 1)
        top = higher
    return (
        top, total, spread, first, itself, previous, distance, duplicate, induction, copying, peak_at,
    )  # fmt: skip


@triton.jit(do_not_specialize=["queries", "keys", "offset"])
@no_type_check
def _rows(
    q, k, mask, own_ids, coming_ids, tokens, before, untils, found, tops, peaks, queries, keys, offset,
    heads, group, factor, low, each, q_b, q_h, q_n, k_b, k_h, k_n, mask_b, mask_h, mask_q, mask_n,
    DIM: tl.constexpr, DIM_ROOM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, IDS: tl.constexpr, PEAK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head; `found` holds statistics `each` numbers from one another."""
    # The last queries see the most keys: they begin first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, c = start + tl.arange(0, QUERIES), tl.arange(0, DIM_ROOM)
    inside, last = row < queries, row + offset
    at = q + batch * q_b + head.to(tl.int64) * q_h + row[:, None].to(tl.int64) * q_n + c[None, :]
    rows = tl.load(at, mask=inside[:, None] & (c < DIM)[None, :], other=0.0)
    k += batch * k_b + (head // group).to(tl.int64) * k_h
    mask += batch * mask_b + head.to(tl.int64) * mask_h
    until = tl.load(untils + batch)
    tokens += batch * keys
    before += batch * keys
    own, coming = row, row
    if IDS:
        own = tl.load(own_ids + batch * queries + row, mask=inside, other=-2)
        coming = tl.load(coming_ids + batch * queries + row, mask=inside, other=-2)

    zero = tl.zeros([QUERIES], tl.float32)
    top = zero + low
    peak_at = tl.full([QUERIES], -1, tl.int32)
    whole = tl.maximum(0, tl.minimum(keys, start + offset - 1) // KEYS * KEYS)
    high = keys
    if CAUSAL:
        high = tl.maximum(0, tl.minimum(keys, start + QUERIES + offset))
    total, spread, first, itself, previous, distance = zero, zero, zero, zero, zero, zero
    duplicate, induction, copying = zero, zero, zero
    (
        top, total, spread, first, itself, previous, distance, duplicate, induction, copying, peak_at,
    ) = _over_keys(
        rows, k, mask, own, coming, tokens, before, row, inside, last, until, top, total, spread, first,
        itself, previous, distance, duplicate, induction, copying, peak_at, 0, whole, keys, factor, low,
        k_n, mask_q, mask_n, DIM, DIM_ROOM, KEYS, CAUSAL, MASK, IDS, PEAK, False, PRECISION,
    )  # fmt: skip
    (
        top, total, spread, first, itself, previous, distance, duplicate, induction, copying, peak_at,
    ) = _over_keys(
        rows, k, mask, own, coming, tokens, before, row, inside, last, until, top, total, spread, first,
        itself, previous, distance, duplicate, induction, copying, peak_at, whole, high, keys, factor,
        low, k_n, mask_q, mask_n, DIM, DIM_ROOM, KEYS, CAUSAL, MASK, IDS, PEAK, True, PRECISION,
    )  # fmt: skip

    seen = top > low / 2
    total = tl.where(seen, total, 1.0)
    length = tl.log2(total)
    place = (batch * heads + head) * queries + row
    tl.store(tops + place, top, mask=inside)
    found += place
    each = tl.cast(each, tl.int64)
    tl.store(found, tl.where(seen, (top + length) * LN2, low), mask=inside)
    tl.store(found + each, tl.where(seen, (length - spread / total) * LN2, 0.0), mask=inside)
    tl.store(found + 2 * each, 1.0 / total, mask=inside)
    tl.store(found + 3 * each, first / total, mask=inside)
    tl.store(found + 4 * each, itself / total, mask=inside)
    tl.store(found + 5 * each, previous / total, mask=inside)
    tl.store(found + 6 * each, tl.where(seen, distance / total, 0.0), mask=inside)
    if IDS:
        tl.store(found + 7 * each, duplicate / total, mask=inside)
        tl.store(found + 8 * each, induction / total, mask=inside)
        tl.store(found + 9 * each, copying / total, mask=inside)
    if PEAK:
        tl.store(peaks + place, tl.where(seen, peak_at, -1), mask=inside)


@triton.jit(do_not_specialize=["queries", "keys", "offset"])
@no_type_check
def _columns(
    q, k, mask, tops, shares, received, queries, keys, offset, heads, group, factor, low,
    q_b, q_h, q_n, k_b, k_h, k_n, mask_b, mask_h, mask_q, mask_n,
    DIM: tl.constexpr, DIM_ROOM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of keys receives from all queries of one head."""
    start = tl.program_id(0) * KEYS
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key, c = start + tl.arange(0, KEYS), tl.arange(0, DIM_ROOM)
    q += batch * q_b + head.to(tl.int64) * q_h
    k += batch * k_b + (head // group).to(tl.int64) * k_h
    mask += batch * mask_b + head.to(tl.int64) * mask_h
    place = batch * heads + head
    total = tl.zeros([KEYS], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, start - offset) // QUERIES * QUERIES
    for block in range(begin, queries, QUERIES):
        row = block + tl.arange(0, QUERIES)
        inside = row < queries
        at = q + row[:, None].to(tl.int64) * q_n + c[None, :]
        rows = tl.load(at, mask=inside[:, None] & (c < DIM)[None, :], other=0.0)
        top = tl.load(tops + place * queries + row, mask=inside, other=0.0)
        share = tl.load(shares + place * queries + row, mask=inside, other=0.0)
        scores = _scores(
            rows, k, mask, key, row, inside, row + offset, keys, factor, low, k_n, mask_q, mask_n,
            DIM, DIM_ROOM, CAUSAL, MASK, True, PRECISION,
        )  # fmt: skip
        total += tl.sum(tl.exp2(scores - top[:, None]) * share[:, None], 0)
    tl.store(received + place * keys + key, total, mask=key < keys)
