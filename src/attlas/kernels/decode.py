"""A few queries attend to many slots: flash-decoding over dense, ragged and listed keys and values.

    s_r = q_r · k_n · scale + bias_n        r = (head of the group, query), n = slot
    out_r = Σ_n softmax(s_r)_n v_n          lse_r = log Σ_n exp(s_r)

A program takes the heads that share their keys, all queries, and one run of slots. Each block of slots
is loaded once, with a running maximum and sum (in base 2, float32). A head's own slots, or its own list
of pages, are cut into equal runs, so that short heads end early and long ones are spread as widely. A
second, small kernel merges the runs of all segments by their log-sum-exp.

Cost: dim + v_dim numbers read a slot; 2 · runs · rows · v_dim float32 written and read between.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import e, log2
from typing import Any, no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.ops.segments import Dense, Listed, Ragged

#: What changes from step to step, for which nothing is compiled anew.
_VARYING = [
    "heads", "queries", "slots", "listed", "runs", "first", "all_runs", "index_b", "index_h",
    "visible_b", "visible_h", "visible_q", "visible_each", "bias_b", "bias_h",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
@no_type_check
def _over_a_run(
    q, k, v, lengths, offsets, index, visible, bias, sums, lses, factor,
    heads, queries, slots, listed, lists, runs, first, all_runs,
    q_b, q_h, q_q, k_b, k_h, k_n, v_b, v_h, v_n, index_b, index_h,
    visible_b, visible_h, visible_q, visible_n, visible_each, bias_b, bias_h,
    DIM: tl.constexpr, DIM_ROOM: tl.constexpr, V_DIM: tl.constexpr, V_ROOM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Mean of the values and log₂-sum-exp₂ of the scores, of the heads of one list over one run."""
    place, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    places = tl.num_programs(0)
    kv_head = place // lists
    spot = batch * (places // lists) + kv_head
    row = tl.arange(0, ROWS)
    valid = row < heads // places * queries
    head, query = place * (heads // places) + row // queries, row % queries
    c, d = tl.arange(0, DIM_ROOM), tl.arange(0, V_ROOM)
    asked = tl.load(
        (q + batch * q_b + head.to(tl.int64) * q_h + query * q_q)[:, None] + c[None, :],
        mask=valid[:, None] & (c < DIM)[None, :], other=0.0,
    )  # fmt: skip

    held = slots
    if lengths is not None:
        held = tl.minimum(tl.load(lengths + spot).to(tl.int32), slots)
    k += batch * k_b + kv_head.to(tl.int64) * k_h
    v += batch * v_b + kv_head.to(tl.int64) * v_h
    if bias is not None:
        bias += batch * bias_b + kv_head.to(tl.int64) * bias_h
    if offsets is not None:
        offset = tl.load(offsets + spot).to(tl.int64)
        k += offset * k_n
        v += offset * v_n
        if bias is not None:
            bias += offset
    if visible is not None:
        visible += batch * visible_b
        pairs = (head // visible_each).to(tl.int64) * visible_h + query.to(tl.int64) * visible_q
    end = held
    if PAGE > 0:
        index += batch * index_b + place.to(tl.int64) * index_h
        end = listed

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, V_ROOM], tl.float32)
    run = tl.cdiv(tl.cdiv(end, runs), KEYS) * KEYS
    begin = tl.program_id(1) * run
    if PAGE > 0:
        coming = begin + tl.arange(0, KEYS)
        page = tl.load(index + coming // PAGE, mask=coming < end, other=-1).to(tl.int32)
    for start in range(begin, tl.minimum(begin + run, end), KEYS):
        slot = start + tl.arange(0, KEYS)
        inside = slot < end
        if PAGE > 0:
            # Numbers are read a block ahead: keys whose place waits for a number are not loaded ahead.
            coming = slot + KEYS
            slot = page * PAGE + slot % PAGE
            inside = (page >= 0) & (slot < held)
            page = tl.load(index + coming // PAGE, mask=coming < end, other=-1).to(tl.int32)
        far = slot.to(tl.int64)
        keys = tl.load(
            (k + far * k_n)[:, None] + c[None, :],
            mask=inside[:, None] & (c < DIM)[None, :], other=0.0,
        )  # fmt: skip
        values = tl.load(
            (v + far * v_n)[:, None] + d[None, :],
            mask=inside[:, None] & (d < V_DIM)[None, :], other=0.0,
        )  # fmt: skip
        scores = tl.dot(asked, tl.trans(keys), input_precision="ieee") * factor
        if bias is not None:
            more = tl.load(bias + far, mask=inside, other=0.0).to(tl.float32)
            scores += more[None, :] * 1.4426950408889634  # log₂ e
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (slot[None, :] <= (query + slots - queries)[:, None])
        if visible is not None:
            shown = tl.load(
                visible + pairs[:, None] + far[None, :] * visible_n,
                mask=valid[:, None] & inside[None, :], other=0,
            )  # fmt: skip
            seen = seen & (shown != 0)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        summed = tl.dot(
            weights.to(values.dtype), values, summed * shrink[:, None], input_precision="ieee"
        )
        top = higher

    into = (batch * all_runs + first + tl.program_id(1)) * heads * queries + head * queries + query
    tl.store(lses + into, top + tl.log2(total), mask=valid)
    mean = summed / tl.where(total == 0.0, 1.0, total)[:, None]
    at = sums + into[:, None] * V_DIM + d[None, :]
    tl.store(at, mean, mask=valid[:, None] & (d < V_DIM)[None, :])


@triton.jit(do_not_specialize=["rows", "runs"])
@no_type_check
def _over_runs(
    sums, lses, out, lse, rows, runs,
    V_DIM: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The runs' means, each with its share of the whole row's sum of exponentials."""
    row, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    each = tl.arange(0, ALL)
    everywhere = (batch * runs + each) * rows + row
    top = tl.max(tl.load(lses + everywhere, mask=each < runs, other=float("-inf")), 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([AT_ONCE], tl.float32)
    summed = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, runs, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        here = (batch * runs + part) * rows + row
        share = tl.exp2(tl.load(lses + here, mask=part < runs, other=float("-inf")) - base)
        at = sums + here[:, None] * V_DIM + column[None, :]
        # A run that has seen nothing need not have written its mean.
        means = tl.load(at, mask=(share > 0)[:, None] & (column < V_DIM)[None, :], other=0.0)
        total += share
        summed += tl.sum(means * share[:, None], 0)
    whole = tl.sum(total, 0)
    mean = summed / tl.where(whole == 0.0, 1.0, whole)
    at = batch * rows + row
    tl.store(out + at * V_DIM + column, mean.to(out.dtype.element_ty), mask=column < V_DIM)
    if tl.program_id(1) == 0:
        tl.store(lse + at, (base + tl.log2(whole)) * 0.6931471805599453)  # ln 2


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: slots of a block, and what runs it."""

    keys: int
    warps: int
    stages: int
    programs: int  #: on each multiprocessor; more than fit at once where heads end at unequal times


#: For keys and values of 128 numbers of 16 bits, by kind of segment: fastest of seven to eleven on an
#: H100, at 128k slots and batches of 1 and 8.
TILES: dict[type, Tiles] = {
    Dense: Tiles(128, 4, 3, 1),
    Ragged: Tiles(128, 8, 3, 8),
    Listed: Tiles(64, 4, 3, 3),
}


def tiles(q: Tensor, segment: Dense | Ragged | Listed) -> Tiles:
    """`TILES`, with smaller blocks of wider slots and as many stages as there is room for."""
    dim, v_dim = q.shape[-1], segment.v.shape[-1]
    shared = _device(q.device)[1]
    return _fitted(
        TILES[type(segment)], room(dim), room(v_dim), _rows(q, segment), q.element_size(), shared
    )


@cache
def _fitted(cut: Tiles, dim: int, v_dim: int, rows: int, itemsize: int, shared: int) -> Tiles:
    keys = max(16, cut.keys * 256 // max(256, room(dim + v_dim)))
    stage = keys * (dim + v_dim) * itemsize
    # Queries and weights take their part; the large products of 64 rows want a block more.
    left = shared - rows * (dim + keys) * itemsize - (stage if rows > 32 else 0)
    # A pipeline of so many stages holds one block less.
    return replace(cut, keys=keys, stages=max(1, min(cut.stages, left // stage + 1)))


def runs(q: Tensor, segment: Dense | Ragged | Listed, units: int) -> int:
    """Into how many runs the slots of each head are cut, to give `units` multiprocessors work."""
    cut = tiles(q, segment)
    wanted = units * cut.programs // (q.shape[0] * _places(segment))
    return max(1, min(wanted, -(-_longest(segment) // cut.keys)))


def attend(
    q: Tensor, segment: Dense | Ragged | Listed, scale: float, sums: Tensor, lses: Tensor,
    first: int, each: int,
) -> None:  # fmt: skip
    """Fill runs `first` to `first + each`: means of the values, and log₂-sum-exp₂ of the scores.

    Args:
        q: queries, [batch, heads, queries, dim].
        segment: keys and values.
        scale: of the products.
        sums: [batch, runs, heads, queries, v_dim] float32, to be written.
        lses: [batch, runs, heads, queries] float32, to be written; −∞ where nothing is seen.
        first: the first run that is this segment's.
        each: how many are.
    """
    batch, heads, queries, dim = q.shape
    k, v, cut = segment.k, segment.v, tiles(q, segment)
    lengths, bias = segment.lengths, _unit(getattr(segment, "bias", None))
    offsets = segment.offsets if isinstance(segment, Ragged) else None
    index = _unit(segment.index) if isinstance(segment, Listed) else None
    visible = segment.visible if isinstance(segment, Dense) else None
    if visible is not None:
        visible = visible.expand(batch, -1, queries, -1).view(torch.uint8)
    places = _places(segment)
    kv_heads = places if index is None else k.shape[1]
    _over_a_run[places, each, batch](
        q, k, v, None if lengths is None else lengths.contiguous(),
        None if offsets is None else offsets.contiguous(), index, visible, bias, sums, lses,
        scale * log2(e), heads, queries, k.shape[2] if offsets is None else _longest(segment),
        _longest(segment), places // kv_heads, each, first, sums.shape[1],
        *q.stride()[:3],
        *(k.stride()[:3] if offsets is None else (0, 0, k.stride(0))),
        *(v.stride()[:3] if offsets is None else (0, 0, v.stride(0))),
        *((0, 0) if index is None else index.stride()[:2]),
        *((0, 0, 0, 0, 1) if visible is None else (*visible.stride(), heads // visible.shape[1])),
        *((0, 0) if bias is None or offsets is not None else bias.stride()[:2]),
        DIM=dim, DIM_ROOM=room(dim), V_DIM=v.shape[-1], V_ROOM=room(v.shape[-1]),
        ROWS=_rows(q, segment), KEYS=cut.keys,
        PAGE=segment.page if isinstance(segment, Listed) else 0,
        CAUSAL=isinstance(segment, Dense) and segment.causal and queries > 1,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def merged(sums: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out in `dtype`, natural log-sum-exp in float32) of the runs of all segments."""
    batch, runs, heads, queries, width = sums.shape
    out = sums.new_empty((batch, heads, queries, width), dtype=dtype)
    lse = lses.new_empty((batch, heads, queries))
    everything = room(runs)
    _over_runs[heads * queries, -(-width // 32), batch](
        sums, lses, out, lse, heads * queries, runs, V_DIM=width, COLUMNS=32,
        AT_ONCE=min(128, everything), ALL=everything, num_warps=4,
    )  # fmt: skip
    return out, lse


def room(count: int) -> int:
    """The power of two, at least 16, in which `count` numbers or rows are held."""
    return 16 if count <= 16 else 1 << (count - 1).bit_length()


def units(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return _device(device)[0]


def memory(device: torch.device) -> int:
    """Bytes of shared memory of one block."""
    return _device(device)[1]


def _longest(segment: Dense | Ragged | Listed) -> int:
    if isinstance(segment, Ragged):
        return segment.longest
    if isinstance(segment, Listed):
        return segment.index.shape[2] * segment.page
    return segment.k.shape[2]


def _places(segment: Dense | Ragged | Listed) -> int:
    """Heads that have slots of their own: those of keys, or of lists."""
    if isinstance(segment, Listed):
        return segment.index.shape[1]
    return (segment.offsets if isinstance(segment, Ragged) else segment.k).shape[1]


def _rows(q: Tensor, segment: Dense | Ragged | Listed) -> int:
    """Query rows of a program, filled up for the tensor cores."""
    return room(q.shape[1] // _places(segment) * q.shape[2])


def _unit(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """(Multiprocessors, bytes of shared memory of one block)."""
    if device.type != "cuda":  # Triton's interpreter
        return 1, 227 * 1024
    found: Any = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin
