"""Attention to listed blocks of keys on a GPU, forwards: a block of queries walks along its list.

    s = scale · q Kᵀ + bias, hidden pairs at −∞     out = softmax(s) V     lse = log Σ exp(s)

A program has the queries of one block, of several heads where they share its list and are few, and
takes one tile of the listed keys after the other. As lists ascend, tiles whose every pair is seen come
first and are taken without masks; behind them come those that `causal` or the end of the keys cuts.
Numbers of blocks are loaded one tile ahead, so that no load of keys waits for one.

Cost: 2d multiply-adds for each listed pair, as many as plain attention has for it; K and V are read once
for every block of queries that lists them.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

LOG2E = tl.constexpr(1.4426950408889634)
#: Numbers of a list that are read at once, to find how many there are.
_LOOK = tl.constexpr(512)
#: What changes from call to call, for which nothing is compiled anew.
VARYING = ["heads", "queries", "keys", "offset", "count", "per", "lists_b", "scale"]


@triton.jit
@no_type_check
def rows_at(
    x, batch, head, at, n, x_b, x_h, x_t, live,
    D: tl.constexpr, ROOM: tl.constexpr, CUT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows `at` + n of one head [n, ROOM]; where CUT, zeros for those that are not live.

    By TMA x is a descriptor, n counts up from 0, and what lies outside is 0.
    """
    if TMA:
        found = x.load([batch, head, at, 0]).reshape(n.shape[0], ROOM)
    else:
        d = tl.arange(0, ROOM)
        x += tl.cast(batch, tl.int64) * x_b + tl.cast(head, tl.int64) * x_h + tl.cast(at, tl.int64) * x_t
        place = x + n[:, None] * x_t + d[None, :]
        if CUT:
            mask = live[:, None]
            if D < ROOM:
                mask = mask & (d < D)[None, :]
            found = tl.load(place, mask=mask, other=0.0)
        elif D < ROOM:
            found = tl.load(place, mask=tl.broadcast_to((d < D)[None, :], place.shape), other=0.0)
        else:
            found = tl.load(place)
    return found


@triton.jit
@no_type_check
def packed_at(
    x, batch, head, at, h, n, x_b, x_h, x_t, live, D: tl.constexpr, ROOM: tl.constexpr
):
    """Where the rows `at` + n of heads `head` + h lie, and which numbers are there."""
    d = tl.arange(0, ROOM)
    x += tl.cast(batch, tl.int64) * x_b + tl.cast(head, tl.int64) * x_h + tl.cast(at, tl.int64) * x_t
    place = x + (h.to(tl.int64) * x_h + n * x_t)[:, None] + d[None, :]
    return place, live[:, None] & (d < D)[None, :]


@triton.jit
@no_type_check
def reach(
    lists, count, first, last, keys, KB: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr
):
    """(Listed tiles that are seen whole, those of which anything may be seen) by queries of a block
    at the positions from `first` to `last`."""
    all_see, some_see = keys, keys
    if CAUSAL:
        all_see = tl.minimum(tl.maximum(first + 1, 0), keys)
        some_see = tl.minimum(tl.maximum(last + 1, 0), keys)
    listed, whole, top = 0, 0, -1
    for c in range(0, count, _LOOK):
        n = c + tl.arange(0, _LOOK)
        block = tl.load(lists + n, mask=n < count, other=-1).to(tl.int32)
        listed += tl.sum((block >= 0).to(tl.int32))
        whole += tl.sum(((block >= 0) & ((block + 1) * KB <= all_see)).to(tl.int32))
        top = tl.maximum(top, tl.max(block))
    begin, end = whole * (KB // BK), listed * (KB // BK)
    if KB > BK:
        following = tl.load(lists + whole, mask=whole < listed, other=0).to(tl.int32)
        part = tl.minimum(tl.maximum(all_see - following * KB, 0) // BK, KB // BK)
        begin += tl.where(whole < listed, part, 0)
        beyond = tl.minimum(tl.maximum((top + 1) * KB - some_see, 0) // BK, KB // BK)
        end -= tl.where(listed > 0, beyond, 0)
    return begin, end


@triton.jit
@no_type_check
def seen_pairs(
    at, m, position, valid, keys,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile at key `at` are seen: 1 or all queries by keys. `valid` is that of the row
    of the batch."""
    there = at + m < keys
    seen = there[None, :]
    if PADDED:
        seen = (tl.load(valid + at + m, mask=there, other=0) != 0)[None, :]
    if MASKED and CAUSAL:
        seen = seen & ((at + m)[None, :] <= position[:, None])
    return seen


@triton.jit
@no_type_check
def _walk(
    acc, total, top, query, position, k, v, bias, valid, lists, batch, up, begin, end, keys, scale,
    k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, ROOM: tl.constexpr, KB: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PADDED: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums behind the listed tiles from `begin` to `end`."""
    tiles: tl.constexpr = KB // BK
    m = tl.arange(0, BK)
    number = tl.load(lists + begin // tiles, mask=begin < end, other=0).to(tl.int32)
    for t in range(begin, end):
        following = tl.load(lists + (t + 1) // tiles, mask=t + 1 < end, other=0).to(tl.int32)
        at = tl.multiple_of(number * KB + t % tiles * BK, BK)
        there = at + m < keys
        key = rows_at(k, batch, up, at, m, k_b, k_h, k_t, there, D, ROOM, MASKED, TMA)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if BIAS:
            s = s * scale + (tl.load(bias + at + m, mask=there, other=0.0) * LOG2E)[None, :]
        if MASKED or PADDED:
            seen = seen_pairs(at, m, position, valid, keys, CAUSAL, MASKED, PADDED)
            s = tl.where(seen, s, float("-inf"))
        highest = tl.max(s, 1)
        higher = tl.maximum(top, highest if BIAS else highest * scale)
        base = higher
        if MASKED or PADDED or BIAS:  # a row that sees nothing yet: 0 avoids −∞ − (−∞)
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2((s if BIAS else s * scale) - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        value = rows_at(v, batch, up, at, m, v_b, v_h, v_t, there, D, ROOM, MASKED, TMA)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        top, number = higher, following
    return acc, total, top


@triton.jit(do_not_specialize=VARYING)
@no_type_check
def forward(
    q, k, v, bias, valid, lists, out, lse,
    heads, queries, keys, offset, count, per, lists_b, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, valid_b,
    D: tl.constexpr, ROOM: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr,
    PACK: tl.constexpr, BQ: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    EDGE: tl.constexpr, PADDED: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BQ queries of a block and of PACK heads, row after row; the last blocks, of the longest lists
    under `causal`, come first."""
    at = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ
    packs = heads // PACK
    batch, head = tl.program_id(1) // packs, tl.program_id(1) % packs * PACK
    up = head // GROUP
    r = tl.arange(0, ROWS)
    h, n = r // BQ, r % BQ
    live = (h < PACK) & (at + n < queries)
    place, there = packed_at(q, batch, head, at, h, n, q_b, q_h, q_t, live, D, ROOM)
    query = tl.load(place, mask=there, other=0.0)
    row = (batch * lists_b + head // per) * tl.cdiv(queries, QB) + at // QB
    lists += row.to(tl.int64) * count
    if BIAS:
        bias += (batch * (heads // GROUP) + up).to(tl.int64) * keys
    if PADDED:
        valid += batch.to(tl.int64) * valid_b
    last = offset + tl.minimum(at + BQ, queries) - 1
    whole, end = reach(lists, count, offset + at, last, keys, KB, BK, CAUSAL)
    acc = tl.zeros([ROWS, ROOM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    acc, total, top = _walk(
        acc, total, top, query, offset + at + n, k, v, bias, valid, lists, batch, up, 0, whole, keys,
        scale, k_b, k_h, k_t, v_b, v_h, v_t,
        D, ROOM, KB, BK, CAUSAL, False, PADDED, BIAS, TMA, PRECISION,
    )  # fmt: skip
    if CAUSAL or EDGE:
        acc, total, top = _walk(
            acc, total, top, query, offset + at + n, k, v, bias, valid, lists, batch, up, whole, end,
            keys, scale, k_b, k_h, k_t, v_b, v_h, v_t,
            D, ROOM, KB, BK, CAUSAL, True, PADDED, BIAS, TMA, PRECISION,
        )  # fmt: skip
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    place, there = packed_at(out, batch, head, at, h, n, o_b, o_h, o_t, live, D, ROOM)
    tl.store(place, acc.to(out.dtype.element_ty), mask=there)
    sums = (top + tl.log2(total)) / LOG2E  # −∞ where nothing is seen
    tl.store(lse + (batch * heads + head + h).to(tl.int64) * queries + at + n, sums, mask=live)
