"""Gradients of attention to listed blocks on a GPU, each number summed by one program.

In the names of `attlas.kernels.block_sparse`, with D = rowsum(dO ∘ O) − dlse:

    P = e^(s − lse)     dS = P ∘ (dO Vᵀ − D)     dQ = scale · dS K
    dV = Pᵀ dO          dK = scale · dSᵀ Q       dbias = colsum(dS)

dQ is summed along the lists, as outputs are. dK, dV and dbias are summed along the lists turned round,
which tell for each block of keys the blocks of queries that list it: a program has one tile of keys of
one key head, and takes the queries of all heads that share it. Nothing is added by several programs, so
that the result is the same each time. Under `causal` the queries that a tile hides some keys from are the
first of its list.

Cost: 7d multiply-adds for each listed pair, where one program for all, with sums in memory, has 5d.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.block_sparse import (
    LOG2E,
    VARYING,
    packed_at,
    reach,
    rows_at,
    seen_pairs,
)

_LOOK = tl.constexpr(512)


@triton.jit
@no_type_check
def _walk(
    acc, query, above, top, delta, position, k, v, bias, valid, lists, batch, up, begin, end, keys,
    scale, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, ROOM: tl.constexpr, KB: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PADDED: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ / scale behind the listed tiles from `begin` to `end`."""
    tiles: tl.constexpr = KB // BK
    m = tl.arange(0, BK)
    number = tl.load(lists + begin // tiles, mask=begin < end, other=0).to(tl.int32)
    for t in range(begin, end):
        following = tl.load(lists + (t + 1) // tiles, mask=t + 1 < end, other=0).to(tl.int32)
        at = tl.multiple_of(number * KB + t % tiles * BK, BK)
        there = at + m < keys
        key = rows_at(k, batch, up, at, m, k_b, k_h, k_t, there, D, ROOM, MASKED, TMA)
        value = rows_at(v, batch, up, at, m, v_b, v_h, v_t, there, D, ROOM, MASKED, TMA)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if BIAS:
            s += (tl.load(bias + at + m, mask=there, other=0.0) * LOG2E)[None, :]
        p = tl.exp2(s - top[:, None])
        if MASKED or PADDED:
            p = tl.where(seen_pairs(at, m, position, valid, keys, CAUSAL, MASKED, PADDED), p, 0.0)
        d_s = p * (tl.dot(above, tl.trans(value), input_precision=PRECISION) - delta[:, None])
        acc = tl.dot(d_s.to(key.dtype), key, acc, input_precision=PRECISION)
        number = following
    return acc


@triton.jit(do_not_specialize=VARYING)
@no_type_check
def backward_queries(
    q, k, v, bias, valid, lists, d_out, top, delta, d_q,
    heads, queries, keys, offset, count, per, lists_b, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, dq_b, dq_h, dq_t, valid_b,
    D: tl.constexpr, ROOM: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr,
    PACK: tl.constexpr, BQ: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr,
    EDGE: tl.constexpr, PADDED: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BQ queries of a block and of PACK heads, as `forward` has them."""
    at = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ
    packs = heads // PACK
    batch, head = tl.program_id(1) // packs, tl.program_id(1) % packs * PACK
    up = head // GROUP
    r = tl.arange(0, ROWS)
    h, n = r // BQ, r % BQ
    live = (h < PACK) & (at + n < queries)
    place, there = packed_at(q, batch, head, at, h, n, q_b, q_h, q_t, live, D, ROOM)
    query = tl.load(place, mask=there, other=0.0)
    place, there = packed_at(d_out, batch, head, at, h, n, o_b, o_h, o_t, live, D, ROOM)
    above = tl.load(place, mask=there, other=0.0)
    each = (batch * heads + head + h).to(tl.int64) * queries + at + n
    row_top = tl.load(top + each, mask=live, other=float("inf"))
    row_delta = tl.load(delta + each, mask=live, other=0.0)
    row = (batch * lists_b + head // per) * tl.cdiv(queries, QB) + at // QB
    lists += row.to(tl.int64) * count
    if BIAS:
        bias += (batch * (heads // GROUP) + up).to(tl.int64) * keys
    if PADDED:
        valid += batch.to(tl.int64) * valid_b
    last = offset + tl.minimum(at + BQ, queries) - 1
    whole, end = reach(lists, count, offset + at, last, keys, KB, BK, CAUSAL)
    acc = tl.zeros([ROWS, ROOM], tl.float32)
    acc = _walk(
        acc, query, above, row_top, row_delta, offset + at + n, k, v, bias, valid, lists, batch, up, 0,
        whole, keys, scale, k_b, k_h, k_t, v_b, v_h, v_t,
        D, ROOM, KB, BK, CAUSAL, False, PADDED, BIAS, TMA, PRECISION,
    )  # fmt: skip
    if CAUSAL or EDGE:
        acc = _walk(
            acc, query, above, row_top, row_delta, offset + at + n, k, v, bias, valid, lists, batch, up,
            whole, end, keys, scale, k_b, k_h, k_t, v_b, v_h, v_t,
            D, ROOM, KB, BK, CAUSAL, True, PADDED, BIAS, TMA, PRECISION,
        )  # fmt: skip
    place, there = packed_at(d_q, batch, head, at, h, n, dq_b, dq_h, dq_t, live, D, ROOM)
    tl.store(place, (acc * (scale / LOG2E)).to(d_q.dtype.element_ty), mask=there)


@triton.jit
@no_type_check
def _along(
    d_key, d_value, d_bias, key, value, added, s, q, d_out, top, delta, order, batch, head, first, last,
    listed, heads, queries, offset, scale, q_b, q_h, q_t, o_b, o_h, o_t,
    D: tl.constexpr, ROOM: tl.constexpr, QB: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, EDGE: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of a tile of keys behind the rows of queries from tile `first` to `last` of a list.

    Rows are numbered by the blocks of queries that list the keys, in each by the SHARE heads that have
    this list, and in each of those by queries. Squares are [keys, rows]: what sums over rows reads them
    where they are.
    """
    r = tl.arange(0, ROWS)
    span: tl.constexpr = QB * SHARE
    one: tl.constexpr = ROWS <= QB  # block, and one head
    number = tl.load(order + first * ROWS // span, mask=first < last, other=0)
    for t in range(first, last):
        if one:
            following = tl.load(order + (t + 1) * ROWS // span, mask=t + 1 < last, other=0)
            at, of = number * QB + t * ROWS % QB, head + t * ROWS // QB % SHARE
            n = at + r
            live = n < queries
            query = rows_at(q, batch, of, at, r, q_b, q_h, q_t, live, D, ROOM, EDGE, TMA)
            above = rows_at(d_out, batch, of, at, r, o_b, o_h, o_t, live, D, ROOM, EDGE, TMA)
            number = following
            if TMA:
                row_top = top.load([batch, of, at]).reshape(ROWS)
                row_delta = delta.load([batch, of, at]).reshape(ROWS)
            else:
                each = (batch * heads + of).to(tl.int64) * queries + n
                row_top = tl.load(top + each, mask=live, other=float("inf"))
                row_delta = tl.load(delta + each, mask=live, other=0.0)
        else:
            f = t * ROWS + r
            inside = f // span < listed
            n = tl.load(order + f // span, mask=inside, other=0) * QB + f % QB
            live, h = inside & (n < queries), f // QB % SHARE
            long = n.to(tl.int64)
            place, there = packed_at(q, batch, head, 0, h, long, q_b, q_h, q_t, live, D, ROOM)
            query = tl.load(place, mask=there, other=0.0)
            place, there = packed_at(d_out, batch, head, 0, h, long, o_b, o_h, o_t, live, D, ROOM)
            above = tl.load(place, mask=there, other=0.0)
            each = (batch * heads + head + h).to(tl.int64) * queries + n
            row_top = tl.load(top + each, mask=live, other=float("inf"))
            row_delta = tl.load(delta + each, mask=live, other=0.0)
        p = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
        if BIAS:
            p += added[:, None]
        p = tl.exp2(p - row_top[None, :])
        if MASKED:
            p = tl.where(s[:, None] <= (offset + n)[None, :], p, 0.0)
        d_value = tl.dot(p.to(above.dtype), above, d_value, input_precision=PRECISION)
        d_s = p * (tl.dot(value, tl.trans(above), input_precision=PRECISION) - row_delta[None, :])
        if BIAS:
            d_bias += tl.sum(d_s, 1)
        d_key = tl.dot(d_s.to(query.dtype), query, d_key, input_precision=PRECISION)
    return d_key, d_value, d_bias


@triton.jit(do_not_specialize=[*VARYING, "blocks"])
@no_type_check
def backward_keys(
    q, k, v, bias, valid, order, begins, d_out, top, delta, d_k, d_v, d_bias,
    heads, queries, keys, offset, blocks, per, lists_b, scale,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, dk_b, dk_h, dk_t, valid_b,
    D: tl.constexpr, ROOM: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr,
    SHARE: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    PADDED: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV and dbias of one tile of keys; SHARE heads have one list."""
    at = tl.program_id(0) * BK
    batch, up = tl.program_id(1) // (heads // GROUP), tl.program_id(1) % (heads // GROUP)
    m = tl.arange(0, BK)
    s = at + m
    there = s < keys
    key = rows_at(k, batch, up, at, m, k_b, k_h, k_t, there, D, ROOM, True, False)
    value = rows_at(v, batch, up, at, m, v_b, v_h, v_t, there, D, ROOM, True, False)
    place_bias = (batch * (heads // GROUP) + up).to(tl.int64) * keys + s
    added = tl.zeros([BK], tl.float32)
    if BIAS:
        added = tl.load(bias + place_bias, mask=there, other=0.0) * LOG2E
    d_key, d_value = tl.zeros([BK, ROOM], tl.float32), tl.zeros([BK, ROOM], tl.float32)
    summed = tl.zeros([BK], tl.float32)
    for turn in range(GROUP // SHARE):
        head = up * GROUP + turn * SHARE
        own = begins + (batch * lists_b + head // per).to(tl.int64) * (blocks + 1) + at // KB
        begin = tl.load(own)
        listed = tl.load(own + 1) - begin
        mine = order + begin.to(tl.int64)
        turned, end = 0, tl.cdiv(listed * (QB * SHARE), ROWS)
        if CAUSAL:
            for c in range(0, listed, _LOOK):
                n = c + tl.arange(0, _LOOK)
                first = tl.load(mine + n, mask=n < listed, other=0) * QB + offset
                turned += tl.sum(((n < listed) & (first < at + BK - 1)).to(tl.int32))
            turned = tl.cdiv(turned * (QB * SHARE), ROWS)
            d_key, d_value, summed = _along(
                d_key, d_value, summed, key, value, added, s, q, d_out, top, delta, mine, batch, head, 0,
                turned, listed, heads, queries, offset, scale, q_b, q_h, q_t, o_b, o_h, o_t,
                D, ROOM, QB, SHARE, ROWS, True, EDGE, BIAS, TMA, PRECISION,
            )  # fmt: skip
        d_key, d_value, summed = _along(
            d_key, d_value, summed, key, value, added, s, q, d_out, top, delta, mine, batch, head,
            turned, end, listed, heads, queries, offset, scale, q_b, q_h, q_t, o_b, o_h, o_t,
            D, ROOM, QB, SHARE, ROWS, False, EDGE, BIAS, TMA, PRECISION,
        )  # fmt: skip
    shown = there
    if PADDED:  # what hidden keys summed up is of no use, be it what it may
        shown = tl.load(valid + batch.to(tl.int64) * valid_b + s, mask=there, other=0) != 0
    d_key = tl.where(shown[:, None], d_key * (scale / LOG2E), 0.0)
    d_value = tl.where(shown[:, None], d_value, 0.0)
    place, inside = packed_at(d_k, batch, up, at, m * 0, m, dk_b, dk_h, dk_t, there, D, ROOM)
    tl.store(place, d_key.to(d_k.dtype.element_ty), mask=inside)
    place, inside = packed_at(d_v, batch, up, at, m * 0, m, dk_b, dk_h, dk_t, there, D, ROOM)
    tl.store(place, d_value.to(d_v.dtype.element_ty), mask=inside)
    if BIAS:
        tl.store(d_bias + place_bias, tl.where(shown, summed, 0.0), mask=there)
