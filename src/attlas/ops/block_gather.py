"""Listed blocks of keys, gathered a few blocks of queries at a time: memory of what is listed.

Forward, for each block of queries with its listed keys K, V (a group's heads are rows of one product
where they share a list):

    s = scale · q Kᵀ + bias, hidden pairs at −∞     out = softmax(s) V     lse = log Σ exp(s)

The backward pass keeps out and lse and gathers anew:

    P = e^(s − lse)     dV += Pᵀ dO     dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O) + dlse)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attlas.ops.block_work import Back, Work, differentiable, spread
from attlas.ops.memory_efficient import at_least_float32

#: Scores of a chunk: so few that what is gathered for it is still in a core's caches when it is read.
SCORES = 2**19
#: Times as many on a GPU, at most: as many as there are rows for a list, so that what is gathered for
#: them stays as large, and launches do not cost more than the work.
ON_GPU = 128


def gather(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, work: Work) -> tuple[Tensor, Tensor]:
    """(out, lse) over listed blocks; differentiable in q, k, v and bias."""
    found: tuple[Tensor, Tensor] = _Gathered.apply(q, k, v, bias, work)  # type: ignore[no-untyped-call]
    return found


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor]:
        batch, rows = len(q), work.rows(q)
        pages, extra = (work.pages(k), work.pages(v)), spread(bias, k, work)
        out = rows.new_empty(*rows.shape[:4], v.shape[3])
        lse = at_least_float32(rows.new_empty(rows.shape[:4]))
        for chunk in work.chunks(batch, _at_once(q, work)):
            places, listed = work.places(batch, chunk)
            keys, values = (_taken(page, places) for page in pages)
            own = None if extra is None else _taken(extra, places)[..., 0]
            added = work.added(own, listed, chunk, lse.dtype)
            found = _attended(rows[:, :, chunk], keys, values, added, work.scale)
            out[:, :, chunk], lse[:, :, chunk] = found
        out, lse = work.queries_of(out), work.queries_of(lse[..., None])[..., 0]
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
        rows, d_rows, delta, top, pages, extra, d_q, d_pages, d_extra = Back.of(
            saved, d_out, d_lse, work
        )
        for chunk in work.chunks(len(q), _at_once(q, work)):
            places, listed = work.places(len(q), chunk)
            keys, values = (_taken(page, places) for page in pages)
            own = None if extra is None else _taken(extra, places)[..., 0]
            mine, d_mine = rows[:, :, chunk], d_rows[:, :, chunk]
            added = work.added(own, listed, chunk, top.dtype)
            scores = at_least_float32((mine * work.scale) @ keys.mT).add_(added)
            weights = scores.sub_(top[:, :, chunk]).exp_()
            _give(d_pages[1], places, weights.to(v.dtype).mT @ d_mine)
            d_scores = at_least_float32(d_mine @ values.mT).sub_(delta[:, :, chunk]).mul_(weights)
            if d_extra is not None:
                _give(d_extra, places, d_scores.sum(3)[..., None])
            d_scores = (d_scores * work.scale).to(q.dtype)
            d_q[:, :, chunk] = d_scores @ keys
            _give(d_pages[0], places, d_scores.mT @ mine)
        return *work.gradients(d_q, d_pages, d_extra, q, bias), None


def _at_once(q: Tensor, work: Work) -> int:
    """Scores of a chunk on this device."""
    return SCORES if q.device.type == "cpu" else SCORES * min(ON_GPU, work.group * work.size[0])


def _attended(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of each block of queries over its own slots."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        each = added.expand(*added.shape[:3], q.shape[3], -1).flatten(0, 1)
        # PyTorch's fused kernel, by its own name for its lse, which is 0 where a row sees nothing.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=each, scale=scale
        )
        dead = (added == -torch.inf).all(-1)
        return out.view_as(q), lse.view(q.shape[:4]).masked_fill(dead, -torch.inf)
    scores = at_least_float32((q * scale) @ k.mT).add_(added)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    summed = at_least_float32(weights.to(v.dtype) @ v)
    out = (summed / total.clamp(min=torch.finfo(total.dtype).tiny)).to(q.dtype)
    return out, (top + total.log())[..., 0]


def _taken(pages: Tensor, places: Tensor) -> Tensor:
    """Blocks of keys behind one another: [batch, lists, q_blocks, count · k_block, width]."""
    found = pages.flatten(1).index_select(0, places.flatten())
    return found.view(*places.shape[:3], -1, pages.shape[-1])


def _give(pages: Tensor, places: Tensor, x: Tensor) -> None:
    """Add what slots got to their blocks. What stands for no block got 0."""
    pages.flatten(1).index_add_(0, places.flatten(), x.reshape(places.numel(), -1).to(pages.dtype))
