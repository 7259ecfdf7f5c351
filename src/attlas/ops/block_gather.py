"""Listed blocks of keys, gathered a few blocks of queries at a time: memory of what is listed.

Forward, for each block of queries with its listed keys K, V (a group's heads are rows of one product
where they share a list):

    s = scale · q Kᵀ + bias, hidden pairs at −∞     out = softmax(s) V     lse = log Σ exp(s)

The backward pass keeps out and lse and gathers anew:

    P = e^(s − lse)     dV += Pᵀ dO     dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O) + dlse)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attlas.masks import Mask, causal
from attlas.ops.block_reference import plainly
from attlas.ops.memory_efficient import at_least_float32

#: Scores of a chunk: so few that what is gathered for it is still in a core's caches when it is read.
SCORES = 2**19


def gather(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: tuple[int, int], mask: Mask | None,
    bias: Tensor | None, scale: float, q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) over listed blocks; differentiable in q, k, v and bias."""
    work = _Work(blocks.long(), size, mask, scale, q_offset, *q.shape[1:3], *k.shape[1:3])
    found: tuple[Tensor, Tensor] = _Gathered.apply(q, k, v, bias, work)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True)
class _Work:
    """Which blocks meet, and how tensors are cut for it. Lists are those of `lists` heads, each of which
    stands for `group` query heads."""

    blocks: Tensor
    size: tuple[int, int]
    mask: Mask | None
    scale: float
    offset: int
    heads: int
    queries: int
    kv_heads: int
    keys: int

    @property
    def lists(self) -> int:
        return max(self.blocks.shape[1], self.kv_heads)

    @property
    def group(self) -> int:
        return self.heads // self.lists

    def rows(self, x: Tensor) -> Tensor:
        """What queries have, block by block: [batch, lists, q_blocks, group · q_block, width]."""
        count, short = self.blocks.shape[2], -self.queries % self.size[0]
        x = pad(x, (0, 0, 0, short)) if short else x
        x = x.view(x.shape[0], self.lists, self.group, count, self.size[0], x.shape[3])
        return x.transpose(2, 3).flatten(3, 4)

    def queries_of(self, x: Tensor) -> Tensor:
        """The inverse of `rows`."""
        x = x.unflatten(3, (self.group, self.size[0])).transpose(2, 3)
        return x.flatten(1, 2).flatten(2, 3)[:, :, : self.queries]

    def pages(self, x: Tensor, value: float = 0.0) -> Tensor:
        """What keys have, a block a row: [batch · kv_heads · k_blocks, k_block, width]."""
        short = -self.keys % self.size[1]
        x = pad(x, (0, 0, 0, short), value=value) if short else x
        return x.reshape(-1, self.size[1], x.shape[3])

    def keys_of(self, pages: Tensor, batch: int) -> Tensor:
        """The inverse of `pages`."""
        return pages.view(batch, self.kv_heads, -1, pages.shape[-1])[:, :, : self.keys]

    def chunks(self, batch: int) -> Iterator[slice]:
        """Blocks of queries whose scores are held at once."""
        count, listed = self.blocks.shape[2:]
        each = batch * self.heads * self.size[0] * listed * self.size[1]
        step = max(1, SCORES // max(each, 1))
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def places(self, batch: int, chunk: slice) -> tuple[Tensor, Tensor]:
        """(rows of `pages`, blocks) of a chunk, [batch, lists, q_blocks, count]."""
        listed = self.blocks[:, :, chunk]
        if listed.device.type == "cpu":  # which can be asked how long the longest list is
            listed = listed[..., : max(1, int((listed >= 0).sum(-1).max()))]
        listed = listed.expand(batch, self.lists, -1, -1)
        head = torch.arange(self.lists, device=listed.device) // (self.lists // self.kv_heads)
        first = torch.arange(batch, device=listed.device)[:, None] * self.kv_heads + head
        there = -(-self.keys // self.size[1])
        return first[:, :, None, None] * there + listed.clamp(0, there - 1), listed

    def added(
        self, bias: Tensor | None, listed: Tensor, chunk: slice, dtype: torch.dtype
    ) -> Tensor:
        """What is added to a chunk's scores, −∞ to hidden pairs.

        It is [batch, lists, q_blocks, 1 or group · q_block, slots].
        """
        at = listed[..., None] * self.size[1] + torch.arange(self.size[1], device=listed.device)
        hidden = ((listed[..., None] < 0) | (at >= self.keys)).flatten(3)[..., None, :]
        row = torch.zeros_like(hidden, dtype=dtype) if bias is None else bias.to(dtype)[..., None, :]
        row = row.masked_fill(hidden, -torch.inf)
        return row if self.mask is None else self._hidden(row, at.flatten(3), chunk)

    def _hidden(self, row: Tensor, at: Tensor, chunk: slice) -> Tensor:
        """The same with −∞ for the pairs that the pattern hides."""
        assert self.mask is not None
        device, (q_block, k_block) = at.device, self.size
        q = torch.arange(chunk.start * q_block, chunk.stop * q_block, device=device) + self.offset
        q = q.view(-1, 1, q_block, 1)
        first = 0
        if self.mask == causal:  # slots before are seen by all queries of their blocks
            whole = (at[..., k_block - 1 :: k_block] <= q[:, 0, 0]) & (at[..., ::k_block] >= 0)
            first = int(whole.flatten(0, 2).all(0).long().cumprod(0).sum()) * k_block
        if first == at.shape[-1]:
            return row
        b = torch.arange(at.shape[0], device=device).view(-1, 1, 1, 1, 1, 1)
        h = torch.arange(self.heads, device=device).view(self.lists, 1, self.group, 1, 1)
        k = at[..., first:].clamp(min=0, max=self.keys - 1)[:, :, :, None, None]
        seen = self.mask.visible(b, h, q.clamp(max=self.queries - 1 + self.offset), k)
        each = row.expand(*row.shape[:3], self.group * q_block, -1).clone()
        each.unflatten(3, (self.group, q_block))[..., first:].masked_fill_(~seen, -torch.inf)
        return each


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, work: _Work
    ) -> tuple[Tensor, Tensor]:
        batch, rows = len(q), work.rows(q)
        pages, extra = (work.pages(k), work.pages(v)), _spread(bias, k, work)
        out = rows.new_empty(*rows.shape[:4], v.shape[3])
        lse = at_least_float32(rows.new_empty(rows.shape[:4]))
        for chunk in work.chunks(batch):
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
        q, k, v, bias, out, lse = ctx.saved_tensors
        work: _Work = ctx.work
        if torch.is_grad_enabled():  # the gradient will itself be differentiated
            return *_differentiable(q, k, v, bias, work, (d_out, d_lse)), None
        batch = len(q)
        delta = (at_least_float32(d_out) * at_least_float32(out)).sum(-1) - d_lse
        safe = lse.masked_fill(lse == -torch.inf, torch.inf)
        rows, d_rows = work.rows(q), work.rows(d_out)
        delta, safe = (work.rows(x[..., None]) for x in (delta, safe))
        pages, extra = (work.pages(k), work.pages(v)), _spread(bias, k, work)
        d_q = at_least_float32(torch.zeros_like(rows))
        d_pages = [at_least_float32(torch.zeros_like(page)) for page in pages]
        d_extra = None if extra is None else torch.zeros_like(extra)
        for chunk in work.chunks(batch):
            places, listed = work.places(batch, chunk)
            keys, values = (_taken(page, places) for page in pages)
            own = None if extra is None else _taken(extra, places)[..., 0]
            mine, d_mine = rows[:, :, chunk], d_rows[:, :, chunk]
            added = work.added(own, listed, chunk, safe.dtype)
            scores = at_least_float32((mine * work.scale) @ keys.mT).add_(added)
            weights = scores.sub_(safe[:, :, chunk]).exp_()
            _give(d_pages[1], places, weights.to(v.dtype).mT @ d_mine)
            d_scores = at_least_float32(d_mine @ values.mT).sub_(delta[:, :, chunk]).mul_(weights)
            if d_extra is not None:
                _give(d_extra, places, d_scores.sum(3)[..., None])
            d_scores = (d_scores * work.scale).to(q.dtype)
            d_q[:, :, chunk] = d_scores @ keys
            _give(d_pages[0], places, d_scores.mT @ mine)
        d_k, d_v = (work.keys_of(page, batch).to(k.dtype) for page in d_pages)
        d_bias = None
        if bias is not None and d_extra is not None:
            d_bias = work.keys_of(d_extra, batch)[..., 0].sum_to_size(bias.shape).to(bias.dtype)
        return work.queries_of(d_q).to(q.dtype), d_k, d_v, d_bias, None


def _differentiable(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, work: _Work, grads: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """The gradients as functions of all that they depend on, with all pairs in memory."""
    found = plainly(q, k, v, work.blocks, work.size, work.mask, bias, work.scale, work.offset)
    given = (q, k, v, bias)
    wanted = [t for t in given if t is not None and t.requires_grad]
    each = iter(torch.autograd.grad(found, wanted, grads, create_graph=True, allow_unused=True))
    return [next(each) if t is not None and t.requires_grad else None for t in given]


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


def _spread(bias: Tensor | None, k: Tensor, work: _Work) -> Tensor | None:
    """The keys' biases a block a row, in float32 at least."""
    if bias is None:
        return None
    return work.pages(at_least_float32(bias).expand(k.shape[:3])[..., None])


def _taken(pages: Tensor, places: Tensor) -> Tensor:
    """Blocks of keys behind one another: [batch, lists, q_blocks, count · k_block, width]."""
    found = pages.flatten(1).index_select(0, places.flatten())
    return found.view(*places.shape[:3], -1, pages.shape[-1])


def _give(pages: Tensor, places: Tensor, x: Tensor) -> None:
    """Add what slots got to their blocks. What stands for no block got 0."""
    pages.flatten(1).index_add_(0, places.flatten(), x.reshape(places.numel(), -1).to(pages.dtype))
