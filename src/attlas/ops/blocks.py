"""The blocks route: SDPA on each chunk of queries with the keys that its pattern leaves visible.

What FlexAttention's block masks do on a GPU, in the calls that a CPU runs well: the visible blocks
of keys are joined, cut pair by pair only where the pattern needs it, and the plan is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attlas.masks import Mask, at, grid
from attlas.masks.kept import kept_by_mask

#: Queries and keys to a block: fine enough to skip much, coarse enough for few calls.
QUERIES, KEYS = 128, 64


@dataclass(frozen=True)
class _Chunk:
    """Queries of one call, the keys they may see, and which pairs where not all of them."""

    rows: slice
    keys: slice | Tensor
    visible: Tensor | None


def blocks(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float, q_offset: int) -> Tensor:
    """Exact attention under a pattern; rows that see nothing give 0."""
    out = []
    for chunk in plan(mask, q.shape[2], k.shape[2], q_offset, q.device):
        rows = q[:, :, chunk.rows]
        if isinstance(chunk.keys, slice) and chunk.keys.start == chunk.keys.stop:
            out.append(rows.new_zeros(*rows.shape[:3], v.shape[3]))
            continue
        part = scaled_dot_product_attention(
            rows, k[:, :, chunk.keys], v[:, :, chunk.keys], attn_mask=chunk.visible, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        if chunk.visible is not None:
            part = part.masked_fill(~chunk.visible.any(-1, keepdim=True), 0.0)
        out.append(part)
    return torch.cat(out, dim=2)


@kept_by_mask(16)
def plan(
    mask: Mask, q_len: int, k_len: int, q_offset: int, device: torch.device
) -> tuple[_Chunk, ...]:
    """The calls to make, kept for the next forward pass of the same shape."""
    some, every = grid(mask, q_len, k_len, q_block=QUERIES, k_block=KEYS, q_offset=q_offset)
    some, every = some.flatten(0, 1).any(0), every.flatten(0, 1).all(0)
    chunks = []
    for row in range(len(some)):
        rows = slice(row * QUERIES, min((row + 1) * QUERIES, q_len))
        found = some[row].nonzero()[:, 0]
        keys = _keys(found, k_len, device)
        visible = None
        if len(found) and not every[row][found].all():
            q = torch.arange(rows.start, rows.stop, device=device) + q_offset
            k = torch.arange(k_len, device=device)[keys]
            visible = at(mask, q, k).contiguous()
        chunks.append(_Chunk(rows, keys, visible))
    return tuple(chunks)


def _keys(found: Tensor, k_len: int, device: torch.device) -> slice | Tensor:
    """The keys of the blocks found: a slice when they are neighbours, else their indices."""
    if not len(found):
        return slice(0, 0)
    first, last = int(found[0]), int(found[-1])
    if last - first + 1 == len(found):
        return slice(first * KEYS, min((last + 1) * KEYS, k_len))
    index = (found[:, None] * KEYS + torch.arange(KEYS)).flatten()
    return index[index < k_len].to(device)
