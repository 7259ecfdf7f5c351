"""Listed blocks of keys where lists are those of one token: each block meets the queries that list it.

A query's own list would be gathered for it alone; a block of keys is read once here for all the queries
that chose it. With m, l, a of each query, which begin as −∞, 0, 0, for each block of keys in turn

    m' = max(m, max s)     l' = e^(m−m') l + Σ e^(s−m')     a' = e^(m−m') a + e^(s−m') V

and out = a / l, lse = m + log l. The backward pass goes the same way, as that of `block_gather`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attlas.ops.block_work import Back, Work, differentiable, spread
from attlas.ops.memory_efficient import at_least_float32

#: Scores held at once: 4 MiB in float32.
SCORES = 2**20


class _Meeting(NamedTuple):
    """A block of keys and rows of queries that list it."""

    page: int
    rows: Tensor
    hidden: Tensor | None


def scatter(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, work: Work) -> tuple[Tensor, Tensor]:
    """(out, lse) over listed blocks; differentiable in q, k, v and bias."""
    found: tuple[Tensor, Tensor] = _Scattered.apply(q, k, v, bias, work)  # type: ignore[no-untyped-call]
    return found


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor]:
        shape, rows = work.rows(q).shape, work.rows(q).flatten(0, 2)
        pages, extra = (work.pages(k), work.pages(v)), spread(bias, k, work)
        top = at_least_float32(rows.new_full(rows.shape[:2], -torch.inf))
        total = torch.zeros_like(top)
        summed = total.new_zeros(*total.shape, v.shape[3])
        for met in meetings(work, len(q)):
            scores = _scores(rows[met.rows], pages[0][met.page], extra, met, work)
            before = top[met.rows]
            higher = torch.maximum(before, scores.amax(-1))
            base = higher.masked_fill(higher == -torch.inf, 0.0)
            weights = scores.sub_(base[..., None]).exp_()
            shrink = (before - base).exp()
            top[met.rows] = higher
            total[met.rows] = total[met.rows] * shrink + weights.sum(-1)
            own = at_least_float32(weights.to(v.dtype) @ pages[1][met.page])
            summed[met.rows] = summed[met.rows] * shrink[..., None] + own
        lse = top + total.log()
        out = (summed / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None]).to(q.dtype)
        out = work.queries_of(out.view(*shape[:4], v.shape[3]))
        lse = work.queries_of(lse.view(*shape[:4], 1))[..., 0]
        ctx.work = work
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing asking computes it again
        q, k, v, bias, *_ = saved
        work: Work = ctx.work
        if torch.is_grad_enabled():  # the gradient will itself be differentiated
            return *differentiable(q, k, v, bias, work, (d_out, d_lse)), None
        back = Back.of(saved, d_out, d_lse, work)
        rows, d_rows, delta, top, d_q = (
            x.flatten(0, 2) for x in (back.rows, back.d_rows, back.delta, back.top, back.d_q)
        )
        pages, extra, d_pages, d_extra = back.pages, back.extra, back.d_pages, back.d_extra
        for met in meetings(work, len(q)):
            keys, values = (page[met.page] for page in pages)
            mine, d_mine = rows[met.rows], d_rows[met.rows]
            weights = _scores(mine, keys, extra, met, work).sub_(top[met.rows]).exp_()
            d_pages[1][met.page] += _summed(weights.to(v.dtype), d_mine)
            d_scores = at_least_float32(d_mine @ values.mT).sub_(delta[met.rows]).mul_(weights)
            if d_extra is not None:
                d_extra[met.page, :, 0] += d_scores.sum((0, 1))
            d_scores = (d_scores * work.scale).to(q.dtype)
            d_q[met.rows] += d_scores @ keys
            d_pages[0][met.page] += _summed(d_scores, mine)
        return *work.gradients(back.d_q, d_pages, d_extra, q, bias), None


def meetings(work: Work, batch: int) -> Iterator[_Meeting]:
    """Each block of keys with the rows of `work.rows` that list it, few enough for scores to be held."""
    places, listed = work.places(batch, slice(0, work.blocks.shape[2]))
    there = (listed >= 0).flatten().nonzero()[:, 0]
    row = there // listed.shape[-1]
    page, order = places.flatten()[there].sort(stable=True)
    row = row[order]
    most = max(1, SCORES // (work.group * work.size[0] * work.size[1]))
    which, counts = page.unique_consecutive(return_counts=True)
    start = 0
    for number, count in zip(which.tolist(), counts.tolist(), strict=True):
        for first in range(start, start + count, most):
            rows = row[first : min(first + most, start + count)]
            yield _Meeting(number, rows, work.hidden_from(rows, number))
        start += count


def _scores(rows: Tensor, keys: Tensor, extra: Tensor | None, met: _Meeting, work: Work) -> Tensor:
    """Scores of rows over one block, hidden pairs at −∞: [rows, group · q_block, k_block]."""
    scores = at_least_float32((rows * work.scale) @ keys.mT)
    if extra is not None:
        scores += extra[met.page, :, 0]
    return scores if met.hidden is None else scores.masked_fill_(met.hidden, -torch.inf)


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ @ right over all rows, in float32 at least: [k_block, width]."""
    return at_least_float32(left.flatten(0, 1).mT @ right.flatten(0, 1))
