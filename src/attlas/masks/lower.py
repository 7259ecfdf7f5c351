"""Lowerings of a mask: a dense boolean tensor, SDPA's flags, a block grid, FlexAttention's BlockMask.

Queries sit at positions `q_offset + 0..q_len-1`; the default offset `k_len - q_len` aligns the last
query with the last key, as decoding with a cache needs.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attlas.masks.algebra import And, Mask
from attlas.masks.kept import kept_by_mask
from attlas.tracing import traced


def dense(
    mask: Mask,
    q_len: int,
    k_len: int,
    *,
    q_offset: int | None = None,
    device: torch.device | str = "cpu",
) -> Bool[Tensor, "batch heads queries keys"]:
    """The mask pair by pair; batch and heads are 1 where the pattern does not tell them apart."""
    q = torch.arange(q_len, device=device) + _offset(q_len, k_len, q_offset)
    return at(mask, q, torch.arange(k_len, device=device))


def both(a: Mask | None, b: Mask | None) -> Mask | None:
    """The pairs that two patterns show; None shows all."""
    return a & b if a is not None and b is not None else a if b is None else b


def at(mask: Mask, q: Tensor, k: Tensor) -> Bool[Tensor, "batch heads queries keys"]:
    """The mask at positions q [queries] or [batch, queries] and k [keys] or [batch, keys]."""
    b = torch.arange(1 if mask.batch is None else mask.batch, device=q.device)[:, None, None, None]
    h = torch.arange(mask.heads or 1, device=q.device)[:, None, None]
    q = q[:, None, :, None] if q.ndim == 2 else q[:, None]
    k = k[:, None, None, :] if k.ndim == 2 else k
    seen = mask.visible(b, h, q, k)
    return seen.expand(torch.broadcast_shapes(seen.shape, (1, 1, q.shape[-2], k.shape[-1])))


def grid(
    mask: Mask,
    q_len: int,
    k_len: int,
    *,
    q_block: int,
    k_block: int,
    q_offset: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[
    Bool[Tensor, "batch heads q_blocks k_blocks"], Bool[Tensor, "batch heads q_blocks k_blocks"]
]:
    """(some, every) for each block of pairs, by arithmetic alone; ~some are the empty blocks."""
    offset = _offset(q_len, k_len, q_offset)
    q_lo = torch.arange(0, q_len, q_block, device=device)[:, None]
    k_lo = torch.arange(0, k_len, k_block, device=device)
    q_hi = (q_lo + q_block - 1).clamp(max=q_len - 1)
    k_hi = (k_lo + k_block - 1).clamp(max=k_len - 1)
    some, every = mask.reach(q_lo + offset, q_hi + offset, k_lo, k_hi)
    some, every, *_ = torch.broadcast_tensors(some, every, q_lo[None, None], k_lo)
    return some, every


def sdpa_flags(
    mask: Mask | None,
    q_len: int,
    k_len: int,
    *,
    q_offset: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Arguments for `scaled_dot_product_attention`: its causal flag, nothing, or a dense mask."""
    if mask is None:
        return {}
    offset = _offset(q_len, k_len, q_offset)
    if _is_causal(mask) and offset == 0 and q_len == k_len:
        return {"is_causal": True}
    if hides_nothing(mask, q_len, k_len, offset):
        return {}
    return {"attn_mask": dense(mask, q_len, k_len, q_offset=offset, device=device)}


def hides_nothing(mask: Mask, q_len: int, k_len: int, q_offset: int) -> bool:
    """Whether the pattern is known to show every pair, told by arithmetic on the whole rectangle."""
    if isinstance(mask, And):
        return all(hides_nothing(m, q_len, k_len, q_offset) for m in (mask.left, mask.right))
    if _is_causal(mask):
        return q_offset >= k_len - 1
    if traced():  # nothing else can be told of lengths alone
        return False
    if any(leaf.tensors for leaf in mask.leaves):  # told in less time than what was kept is looked up
        return _every(mask, q_len, k_len, q_offset)
    return _shows_all(mask, q_len, k_len, q_offset)


def _every(mask: Mask, q_len: int, k_len: int, q_offset: int) -> bool:
    _, every = grid(mask, q_len, k_len, q_block=q_len, k_block=k_len, q_offset=q_offset)
    return bool(every.all())


_shows_all = kept_by_mask(256)(_every)


@kept_by_mask(256)
def density(mask: Mask, q_len: int, k_len: int, q_offset: int, block: int = 128) -> float:
    """Share of blocks that may hold a visible pair."""
    some, _ = grid(mask, q_len, k_len, q_block=block, k_block=block // 2, q_offset=q_offset)
    return some.float().mean().item()


@kept_by_mask(128)
def block_mask(
    mask: Mask,
    q_len: int,
    k_len: int,
    *,
    q_offset: int | None = None,
    block: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """FlexAttention's BlockMask, built from the pattern's arithmetic and kept for the next call.

    No pair is evaluated: the cost is that of a grid of (length / block)² booleans.
    """
    offset = _offset(q_len, k_len, q_offset)
    some, every = grid(
        mask, q_len, k_len, q_block=block, k_block=block, q_offset=offset, device=device
    )
    # A ragged last block is never "full": the kernel must still cut it at the sequence's end.
    whole = torch.ones(some.shape[-2:], dtype=torch.bool, device=device)
    whole[-1, :] &= q_len % block == 0
    whole[:, -1] &= k_len % block == 0
    every = every & whole

    mask = _beside(mask, device)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask.visible(b, h, q_idx + offset, kv_idx)

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every), *_ordered(some & every),
        BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(q_len, k_len),
    )  # fmt: skip


def _beside(mask: Mask, device: torch.device | str) -> Mask:
    """The mask with its tensors where the indices are: a kernel cannot move them."""
    from attlas.masks.patterns import ByTensor

    leaves = [leaf for leaf in mask.leaves if isinstance(leaf, ByTensor)]
    if all(leaf.held.device == torch.device(device) for leaf in leaves):
        return mask
    copied = deepcopy(mask)
    for leaf in copied.leaves:
        if isinstance(leaf, ByTensor):
            leaf.held = leaf.held.to(device)
    return copied


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(count, indices) of the chosen key blocks of each row, those chosen first."""
    count = chosen.sum(-1, dtype=torch.int32)
    order = torch.sort(chosen.to(torch.uint8), dim=-1, descending=True, stable=True).indices
    return count, order.to(torch.int32)


def _is_causal(mask: Mask) -> bool:
    from attlas.masks.patterns import causal

    return mask == causal


def _offset(q_len: int, k_len: int, q_offset: int | None) -> int:
    return k_len - q_len if q_offset is None else q_offset
