"""Latent attention of a few queries in one reading of the tokens: flash-decoding for shared latents.

    s_r = (content_r · latent_n + rotated_r · rotary_n) · scale        r = (head, query), n = token
    out_r = Σ_n softmax(s_r)_n latent_n

A program takes a block of rows r and a run of tokens. Each block of tokens is loaded once, meets all
rows as keys and is summed as values, with a running maximum and sum (in base 2, float32). As few
rows leave most of a GPU idle, the tokens are cut into as many runs as fill it; a second, small
kernel merges what the runs gave, by their log-sum-exp.

Cost: latent + rotary numbers read a token; 2 · runs · rows · latent float32 written and read between.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2
from typing import Any, no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "queries", "keys", "run"])
@no_type_check
def _over_a_run(
    content, rotated, tokens, visible, sums, lses, factor, rows, queries, keys, run,
    content_b, content_h, content_q, rotated_b, rotated_h, rotated_q, tokens_b, tokens_n,
    visible_b, visible_h, visible_q, visible_n,
    LATENT: tl.constexpr, ROTARY: tl.constexpr, ROTARY_ROOM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weighted sum and log₂-sum-exp₂ of one block of rows over one run of tokens."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    head, query = row // queries, row % queries
    c, r = tl.arange(0, LATENT), tl.arange(0, ROTARY_ROOM)
    at = content + batch * content_b + head * content_h + query * content_q
    q = tl.load(at[:, None] + c[None, :], mask=valid[:, None], other=0.0)
    at = rotated + batch * rotated_b + head * rotated_h + query * rotated_q
    narrow = (r < ROTARY)[None, :]
    q_rotated = tl.load(at[:, None] + r[None, :], mask=valid[:, None] & narrow, other=0.0)
    if MASKED:
        visible += batch * visible_b
        pairs = head * visible_h + query * visible_q

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, LATENT], tl.float32)
    first = tl.program_id(1) * run
    for start in range(first, min(first + run, keys), KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < keys
        token = tokens + batch * tokens_b + key.to(tl.int64) * tokens_n
        latent = tl.load(token[:, None] + c[None, :], mask=inside[:, None], other=0.0)
        rotary = tl.load(
            token[:, None] + LATENT + r[None, :], mask=inside[:, None] & narrow, other=0.0
        )
        scores = tl.dot(q, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_rotated, tl.trans(rotary), scores, input_precision="ieee") * factor
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= (query + keys - queries)[:, None])
        if MASKED:
            shown = tl.load(
                visible + pairs[:, None] + key[None, :] * visible_n,
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
            weights.to(latent.dtype), latent, summed * shrink[:, None], input_precision="ieee"
        )
        top = higher

    place = (batch * tl.num_programs(1) + tl.program_id(1)) * rows + row
    tl.store(lses + place, top + tl.log2(total), mask=valid)
    mean = summed / tl.where(total == 0.0, 1.0, total)[:, None]
    at = sums + place[:, None] * LATENT + c[None, :]
    tl.store(at, mean.to(sums.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["rows", "runs"])
@no_type_check
def _over_runs(
    sums, lses, out, rows, runs,
    LATENT: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, ALL: tl.constexpr,
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
        at = sums + here[:, None] * LATENT + column[None, :]
        means = tl.load(at, mask=(part < runs)[:, None], other=0.0)
        total += share
        summed += tl.sum(means * share[:, None], 0)
    whole = tl.sum(total, 0)
    mean = summed / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + (batch * rows + row) * LATENT + column, mean.to(out.dtype.element_ty))


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: rows and tokens of a block, and what runs it."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 1  #: on each multiprocessor


def tiles(rows: int, latent: int, rotary: int, itemsize: int, shared: int) -> Tiles:
    """Tiles for so many rows, with as many stages of tokens as `shared` bytes have room for."""
    if rows <= 16 and latent == 512 and itemsize == 2 and shared >= 180 * 1024:
        return Tiles(16, 64, 8, 3)  # measured fastest of nine on an H200, from 8k to 64k tokens
    block = 16 if rows <= 16 or itemsize == 4 else 32 if rows <= 32 else 64
    keys = max(16, min(128, 32 * 512 // latent) * 2 // itemsize)
    stage = keys * (latent + rotary) * itemsize

    def stages() -> int:
        queries = block * (latent + rotary + 2 * keys) * itemsize
        return min(4, (shared - queries - 4096) // stage)

    while block > 16 and stages() < 2:
        block //= 2
    return Tiles(block, keys, 8 if block * latent > 16 * 512 else 4, max(1, stages()))


def latent_decode(
    content: Tensor, rotated: Tensor, tokens: Tensor, *, scale: float, causal: bool = False,
    visible: Tensor | None = None, cut: Tiles | None = None, multiprocessors: int | None = None,
) -> Tensor:  # fmt: skip
    """Latents summed for each head and query: [batch, heads, queries, latent].

    Args:
        content: what meets the latents, [batch, heads, queries, latent]; the latent a power of two.
        rotated: what meets the rotary keys, [batch, heads, queries, rotary].
        tokens: [batch, 1, tokens, latent + rotary], any strides but along the width.
        scale: of the scores.
        causal: the last query stands at the last token, and none sees later ones.
        visible: booleans that broadcast to [batch, heads, queries, tokens].
        cut: tiles other than those for these shapes.
        multiprocessors: to be filled; the device's unless given.
    """
    batch, heads, queries, latent = content.shape
    keys, rotary, rows = tokens.shape[2], rotated.shape[-1], heads * queries
    content, rotated = (t if t.stride(-1) == 1 else t.contiguous() for t in (content, rotated))
    if tokens.is_cuda:
        device: Any = torch.cuda.get_device_properties(tokens.device)
        shared = device.shared_memory_per_block_optin
        multiprocessors = multiprocessors or device.multi_processor_count
    else:  # Triton's interpreter
        shared, multiprocessors = 227 * 1024, multiprocessors or 1
    cut = cut or tiles(rows, latent, rotary, content.element_size(), shared)
    blocks = triton.cdiv(rows, cut.rows)
    wanted = max(1, multiprocessors * cut.programs // (blocks * batch))
    run = triton.cdiv(triton.cdiv(keys, cut.keys), wanted) * cut.keys
    runs = triton.cdiv(keys, run)
    out = content.new_empty(batch, heads, queries, latent)
    lses = out.new_empty(batch, runs, rows, dtype=torch.float32)
    sums = out if runs == 1 else out.new_empty(batch, runs, rows, latent, dtype=torch.float32)
    shown: Any = out if visible is None else visible.expand(batch, heads, queries, keys)
    _over_a_run[blocks, runs, batch](
        content, rotated, tokens, shown if visible is None else shown.view(torch.uint8), sums, lses,
        scale * log2(e), rows, queries, keys, run,
        *content.stride()[:3], *rotated.stride()[:3], tokens.stride(0), tokens.stride(2),
        *((0, 0, 0, 0) if visible is None else shown.stride()),
        LATENT=latent, ROTARY=rotary, ROTARY_ROOM=max(16, triton.next_power_of_2(rotary)),
        ROWS=cut.rows, KEYS=cut.keys, CAUSAL=causal and queries > 1, MASKED=visible is not None,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if runs > 1:
        columns = min(64, latent)
        _over_runs[rows, latent // columns, batch](
            sums, lses, out, rows, runs, LATENT=latent, COLUMNS=columns, AT_ONCE=32,
            ALL=triton.next_power_of_2(runs), num_warps=4,
        )  # fmt: skip
    return out
