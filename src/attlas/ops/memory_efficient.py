"""Memory-efficient attention: exact, in chunks, with a running maximum and sum.

For a chunk of queries, over chunks j of keys, with s_j = q k_jᵀ · scale:

    m' = max(m, max s_j)     l' = e^(m−m') l + Σ e^(s_j−m')     a' = e^(m−m') a + e^(s_j−m') v_j
    out = a / l              lse = m + log l

The backward pass keeps out and lse alone and makes every chunk of weights again (one that is to be
differentiated itself, as by a gradient penalty, holds all pairs):

    P = e^(s − lse)     dV += Pᵀ dO     dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O) + dlse)

Cost: the n² operations of plain attention, less the blocks that the mask leaves empty, which are
never visited; O(√n) extra memory, forward and backward (256 queries meet 16 √n keys at a time).
Source: "Self-attention Does Not Need O(n²) Memory".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.catalog.kinds import OP
from attlas.catalog.registry import mechanism
from attlas.masks import Mask, at, grid
from attlas.ops.reference import indices, reference
from attlas.ops.toeplitz import add_diagonals, strip, table_of
from attlas.positions.base import ScoreMod, captured, from_table
from attlas.tracing import traced

#: Keys to a block when the mask's empty blocks are looked for.
GRAIN = 64


@mechanism("memory-efficient-attention", kind=OP)
def memory_efficient(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch v_heads keys v_dim"],
    *,
    mask: Mask | Bool[Tensor, "b h #queries #keys"] | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    q_chunk: int = 256,
    k_chunk: int | None = None,
) -> tuple[Float[Tensor, "batch heads queries v_dim"], Float[Tensor, "batch heads queries"]]:
    """(out, lse) of exact attention in O(√n) extra memory; differentiable through both.

    Args:
        q: queries.
        k: keys; their heads divide the query heads.
        v: values; their heads divide the query heads.
        mask: pattern or booleans (True visible); empty blocks of a pattern cost nothing.
        score_mod: pointwise change of scores, after scaling; its trained tensors get gradients when
            it is a method of a module or a closure over them.
        scale: of the products; 1/√dim unless given.
        q_offset: position of the first query; `keys - queries` unless given.
        q_chunk: queries at a time.
        k_chunk: keys at a time; 16 √keys, at least 512, unless given.

    Raises:
        ValueError: chunks below 1.
    """
    keys = k.shape[2]
    k_chunk = max(512, 16 * math.isqrt(keys)) if k_chunk is None else k_chunk
    if q_chunk < 1 or k_chunk < 1:
        raise ValueError(f"q_chunk and k_chunk must be at least 1, got {q_chunk} and {k_chunk}")
    offset = keys - q.shape[2] if q_offset is None else q_offset
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    table = None if traced() else table_of(score_mod, q, keys, offset)
    score_mod = score_mod if table is None else from_table(table)
    work = _Work(mask, score_mod, table, offset, q_chunk, k_chunk, scale)
    trained = [t for t in captured(score_mod) if t.requires_grad]
    result: tuple[Tensor, Tensor] = _Chunked.apply(q, k, v, work, *trained)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Work:
    """What is done to each chunk of scores, and which chunks there are."""

    mask: Mask | Tensor | None
    score_mod: ScoreMod | None
    table: Tensor | None  # of the numbers that score_mod adds, where it hangs on distances alone
    offset: int
    q_chunk: int
    k_chunk: int
    scale: float

    def rows(self, q_len: int) -> Iterator[slice]:
        for start in range(0, q_len, self.q_chunk):
            yield slice(start, min(start + self.q_chunk, q_len))

    def plan(self, q_len: int, k_len: int) -> list[list[tuple[slice, bool]]]:
        """For each chunk of queries, the runs of keys to visit, and whether the mask cuts them."""
        if not isinstance(self.mask, Mask) or traced():
            runs = [
                (slice(s, min(s + self.k_chunk, k_len)), self.mask is not None)
                for s in range(0, k_len, self.k_chunk)
            ]
            return [runs for _ in self.rows(q_len)]
        grain = min(GRAIN, self.k_chunk)
        some, every = grid(
            self.mask, q_len, k_len, q_block=self.q_chunk, k_block=grain, q_offset=self.offset
        )
        some, every = some.flatten(0, 1).any(0), every.flatten(0, 1).all(0)
        return [
            list(_runs(s, e, grain, self.k_chunk // grain, k_len))
            for s, e in zip(some.tolist(), every.tolist(), strict=True)
        ]

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled products of grouped heads, in float32 at least: [batch, heads, rows, keys]."""
        batch, heads, rows, dim = q.shape
        grouped = (q * self.scale).reshape(batch, k.shape[1], heads // k.shape[1] * rows, dim)
        return at_least_float32(grouped @ k.transpose(-1, -2)).view(batch, heads, rows, k.shape[2])

    def modify(self, scores: Tensor, rows: slice, run: slice) -> Tensor:
        if self.score_mod is None:
            return scores
        if self.table is not None:
            return scores.add_(strip(self.table, self.places(rows), run))
        b, h, q, kv = indices(scores, self.offset + rows.start)
        return self.score_mod(scores, b, h, q, kv + run.start)

    def places(self, rows: slice) -> slice:
        """Where these queries stand."""
        return slice(rows.start + self.offset, rows.stop + self.offset)

    def hide(self, scores: Tensor, rows: slice, run: slice) -> Tensor:
        if isinstance(self.mask, Mask):
            _, _, q, kv = indices(scores, self.offset + rows.start)
            visible = at(self.mask, q[:, 0], kv + run.start)
        else:
            assert self.mask is not None
            visible = _cut(_cut(self.mask, -2, rows), -1, run)
        return scores.masked_fill(~visible, -torch.inf)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: _Work, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        plan = work.plan(q.shape[2], k.shape[2])
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = at_least_float32(q.new_zeros(q.shape[:3]))
        for rows, runs in zip(work.rows(q.shape[2]), plan, strict=True):
            out[:, :, rows], lse[:, :, rows] = _forward_rows(q, k, v, work, rows, runs)
        ctx.work, ctx.plan = work, plan
        ctx.save_for_backward(q, k, v, out, lse, *trained)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *trained = ctx.saved_tensors
        work: _Work = ctx.work
        if torch.is_grad_enabled():  # the gradient will itself be differentiated
            return _differentiable(q, k, v, work, trained, (d_out, d_lse))
        grads = [at_least_float32(torch.zeros_like(t)) for t in (q, k, v)]
        d_trained = [torch.zeros_like(t) for t in trained]
        delta = (at_least_float32(d_out) * at_least_float32(out)).sum(-1) - d_lse
        for rows, runs in zip(work.rows(q.shape[2]), ctx.plan, strict=True):
            safe_lse = lse[:, :, rows].masked_fill(lse[:, :, rows] == -torch.inf, torch.inf)
            for run, cut in runs:
                _backward_block(
                    q, k, v, d_out, delta, safe_lse, work, rows, run, cut, grads, trained, d_trained
                )
        dq, dk, dv = (g.to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv, None, *d_trained


def _differentiable(
    q: Tensor, k: Tensor, v: Tensor, work: _Work, trained: list[Tensor], grads: tuple[Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of all that they depend on, with all pairs in memory."""
    found = reference(
        q, k, v, scale=work.scale, mask=work.mask, score_mod=work.score_mod, q_offset=work.offset
    )
    inputs = [t for t in (q, k, v, *trained) if t.requires_grad]
    gradients = iter(torch.autograd.grad(found, inputs, grads, create_graph=True, allow_unused=True))
    each = [next(gradients) if t.requires_grad else None for t in (q, k, v, *trained)]
    return *each[:3], None, *each[3:]


def _forward_rows(
    q: Tensor, k: Tensor, v: Tensor, work: _Work, rows: slice, runs: list[tuple[slice, bool]]
) -> tuple[Tensor, Tensor]:
    chunk = q[:, :, rows]
    top = at_least_float32(chunk.new_full(chunk.shape[:3], -torch.inf))
    total = torch.zeros_like(top)
    summed = at_least_float32(chunk.new_zeros(*chunk.shape[:3], v.shape[3]))
    for run, cut in runs:
        scores = work.modify(work.products(chunk, k[:, :, run]), rows, run)
        scores = work.hide(scores, rows, run) if cut else scores
        higher = torch.maximum(top, scores.amax(-1))
        # A row that has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
        base = higher.masked_fill(higher == -torch.inf, 0.0)
        weights = scores.sub_(base[..., None]).exp_()
        shrink = (top - base).exp()
        total = total * shrink + weights.sum(-1)
        summed = summed * shrink[..., None] + _grouped(weights.to(v.dtype), v[:, :, run])
        top = higher
    lse = top + total.log()
    return (summed / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None]).to(q.dtype), lse


def _backward_block(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, delta: Tensor, lse: Tensor, work: _Work,
    rows: slice, run: slice, cut: bool, grads: list[Tensor], trained: list[Tensor],
    d_trained: list[Tensor],
) -> None:  # fmt: skip
    """Add one block's share to the gradients of q, k, v and of the score_mod's trained tensors."""
    q_rows, k_run, v_run, d_rows = q[:, :, rows], k[:, :, run], v[:, :, run], d_out[:, :, rows]
    raw = work.products(q_rows, k_run)
    changed = work.score_mod is not None and work.table is None
    with torch.set_grad_enabled(changed):
        raw.requires_grad_(changed)
        scores = work.modify(raw, rows, run)
    hidden = work.hide(scores.detach(), rows, run) if cut else scores.detach()
    weights = (hidden - lse[..., None]).exp()
    d_weights = _grouped(d_rows, v_run.transpose(-1, -2))
    d_scores = weights * (at_least_float32(d_weights) - delta[:, :, rows, None])
    if work.table is not None and trained:
        add_diagonals(d_trained[0], d_scores, work.places(rows), run)
    if changed:
        d_raw, *found = torch.autograd.grad(scores, [raw, *trained], d_scores, allow_unused=True)
        for total, part in zip(d_trained, found, strict=True):
            total += 0 if part is None else part
        d_scores = d_raw
    d_scores = d_scores.to(q.dtype) * work.scale
    grads[0][:, :, rows] += _grouped(d_scores, k_run)
    grads[1][:, :, run] += _folded(d_scores, q_rows, k.shape[1])
    grads[2][:, :, run] += _folded(weights.to(v.dtype), d_rows, v.shape[1])


def _grouped(left: Tensor, right: Tensor) -> Tensor:
    """left [b, heads, r, n] @ right [b, kv, n, d], each group of heads with its own right."""
    batch, heads, rows, inner = left.shape
    folded = left.reshape(batch, right.shape[1], heads // right.shape[1] * rows, inner) @ right
    return folded.view(batch, heads, rows, right.shape[3])


def _folded(left: Tensor, right: Tensor, kv_heads: int) -> Tensor:
    """leftᵀ @ right summed over the heads of each group: [b, kv, n, d]."""
    batch, heads, rows, n = left.shape
    rows = heads // kv_heads * rows
    return left.reshape(batch, kv_heads, rows, n).transpose(-1, -2) @ right.reshape(
        batch, kv_heads, rows, right.shape[3]
    )


def _runs(
    some: list[bool], every: list[bool], grain: int, longest: int, k_len: int
) -> Iterator[tuple[slice, bool]]:
    """Neighbouring visible blocks joined, up to `longest` blocks a run."""
    start = 0
    while start < len(some):
        if not some[start]:
            start += 1
            continue
        stop = start + 1
        while stop < len(some) and some[stop] and stop - start < longest:
            stop += 1
        yield slice(start * grain, min(stop * grain, k_len)), not all(every[start:stop])
        start = stop


def _cut(mask: Tensor, dim: int, part: slice) -> Tensor:
    """The part of a mask along `dim`, which may be a broadcast 1."""
    if mask.shape[dim] == 1:
        return mask
    return mask.narrow(dim, part.start, part.stop - part.start)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
