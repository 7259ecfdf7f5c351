"""What the routes over listed blocks share: how tensors are cut into blocks, and what is hidden."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attlas.masks import Mask, causal
from attlas.ops.block_reference import plainly
from attlas.ops.memory_efficient import at_least_float32


@dataclass(frozen=True)
class Work:
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
        """Heads that have a list of their own."""
        return max(self.blocks.shape[1], self.kv_heads)

    @property
    def group(self) -> int:
        """Query heads that share a list."""
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

    def pages(self, x: Tensor) -> Tensor:
        """What keys have, a block a row: [batch · kv_heads · k_blocks, k_block, width]."""
        short = -self.keys % self.size[1]
        x = pad(x, (0, 0, 0, short)) if short else x
        return x.reshape(-1, self.size[1], x.shape[3])

    def keys_of(self, pages: Tensor, batch: int) -> Tensor:
        """The inverse of `pages`."""
        return pages.view(batch, self.kv_heads, -1, pages.shape[-1])[:, :, : self.keys]

    def gradients(
        self, d_rows: Tensor, d_pages: tuple[Tensor, Tensor], d_extra: Tensor | None, q: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Those of queries, keys, values and biases, from what their rows and pages got."""
        d_k, d_v = (self.keys_of(page, len(q)).to(q.dtype) for page in d_pages)
        d_bias = None
        if bias is not None and d_extra is not None:
            d_bias = self.keys_of(d_extra, len(q))[..., 0].sum_to_size(bias.shape).to(bias.dtype)
        return self.queries_of(d_rows).to(q.dtype), d_k, d_v, d_bias

    def chunks(self, batch: int, scores: int) -> Iterator[slice]:
        """Blocks of queries of which so many scores are held at once."""
        count, listed = self.blocks.shape[2:]
        each = batch * self.heads * self.size[0] * listed * self.size[1]
        step = max(1, scores // max(each, 1))
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

    def hidden_from(self, rows: Tensor, page: int) -> Tensor | None:
        """Pairs of some of `rows`, by number, and a block that the pattern hides; None of none."""
        q_block, k_block = self.size
        batch, there, count = page // self._per_row, -(-self.keys // k_block), self.blocks.shape[2]
        at = page % there * k_block + torch.arange(k_block, device=rows.device)
        past = at >= self.keys
        if self.mask is None:
            return past.expand(1, 1, -1) if at[-1] >= self.keys else None
        q = (rows % count * q_block)[:, None] + torch.arange(q_block, device=rows.device)
        q = q.clamp(max=self.queries - 1) + self.offset
        if self.mask == causal and bool((q.min() >= at[-1]) & ~past[-1]):
            return None
        h = rows // count % self.lists * self.group
        h = h[:, None, None, None] + torch.arange(self.group, device=rows.device)[:, None, None]
        b = torch.full_like(h, batch)
        seen = self.mask.visible(b, h, q[:, None, :, None], at.clamp(max=self.keys - 1)) & ~past
        return ~seen.expand(len(rows), self.group, q_block, k_block).flatten(1, 2)

    @property
    def _per_row(self) -> int:
        """Blocks of keys of a row of the batch, over all heads."""
        return self.kv_heads * -(-self.keys // self.size[1])


class Back(NamedTuple):
    """What a backward pass begins with, cut as `Work` cuts it, and what it adds to.

    Attributes:
        rows: queries.
        d_rows: gradient of the output.
        delta: rowsum(dO ∘ O) − dlse.
        top: lse, +∞ where a row sees nothing.
        pages: keys and values.
        extra: biases, or None.
        d_q: zeros for the gradient of `rows`, as the others.
        d_pages: of keys and values.
        d_extra: of biases.
    """

    rows: Tensor
    d_rows: Tensor
    delta: Tensor
    top: Tensor
    pages: tuple[Tensor, Tensor]
    extra: Tensor | None
    d_q: Tensor
    d_pages: tuple[Tensor, Tensor]
    d_extra: Tensor | None

    @classmethod
    def of(
        cls, saved: tuple[Tensor | None, ...], d_out: Tensor, d_lse: Tensor, work: Work
    ) -> Back:
        """Of what the forward pass saved: q, k, v, bias, out and lse."""
        q, k, v, bias, out, lse = saved
        assert q is not None
        assert k is not None
        assert v is not None
        assert out is not None
        assert lse is not None
        delta = (at_least_float32(d_out) * at_least_float32(out)).sum(-1) - d_lse
        top = lse.masked_fill(lse == -torch.inf, torch.inf)
        rows, d_rows = work.rows(q), work.rows(d_out)
        pages, extra = (work.pages(k), work.pages(v)), spread(bias, k, work)

        def zeros(x: Tensor) -> Tensor:
            return at_least_float32(x.new_zeros(x.shape))

        return cls(
            rows, d_rows, work.rows(delta[..., None]), work.rows(top[..., None]), pages, extra,
            zeros(rows), (zeros(pages[0]), zeros(pages[1])), None if extra is None else zeros(extra),
        )  # fmt: skip


def differentiable(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, work: Work, grads: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """The gradients as functions of all that they depend on, with all pairs in memory."""
    found = plainly(q, k, v, work.blocks, work.size, work.mask, bias, work.scale, work.offset)
    given = (q, k, v, bias)
    wanted = [t for t in given if t is not None and t.requires_grad]
    each = iter(torch.autograd.grad(found, wanted, grads, create_graph=True, allow_unused=True))
    return [next(each) if t is not None and t.requires_grad else None for t in given]


def spread(bias: Tensor | None, k: Tensor, work: Work) -> Tensor | None:
    """The keys' biases a block a row, in float32 at least."""
    if bias is None:
        return None
    return work.pages(at_least_float32(bias).expand(k.shape[:3])[..., None])


