"""Attention to listed blocks by its definition, with all scores in memory; and lists of a mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attlas.masks import Mask, grid
from attlas.masks.pages import Pages, parted
from attlas.ops.reference import reference, repeated
from attlas.tracing import traced


def plainly(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: tuple[int, int], mask: Mask | None,
    bias: Tensor | None, scale: float, q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) with the lists as a mask of all pairs."""
    heads = q.shape[1]
    pattern: Mask = Pages(blocks if blocks.shape[1] == 1 else repeated(blocks, heads), size, q_offset)
    pattern = pattern if mask is None else pattern & mask
    if bias is None:
        return reference(q, k, v, scale=scale, mask=pattern, q_offset=q_offset)
    each = bias if bias.shape[1] == 1 else repeated(bias, heads)

    def add(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + each[:, :, None].to(score.dtype)

    return reference(q, k, v, scale=scale, mask=pattern, score_mod=add, q_offset=q_offset)


def lists_of(
    mask: Mask, queries: int, keys: int, q_offset: int, device: torch.device
) -> tuple[Tensor, tuple[int, int], Mask | None]:
    """(blocks, size, the pattern that holds inside them) of a mask that holds `pages`."""
    if (found := parted(mask)) is not None:
        own, rest = found
        row, beside = divmod(q_offset - own.first, own.size[0])
        if row >= 0 and not beside:
            count = -(-queries // own.size[0])
            blocks = own.held[:, :, row : row + count].to(device)
            return pad(blocks, (0, 0, 0, count - blocks.shape[2]), value=-1), own.size, rest
    size = next(leaf for leaf in mask.leaves if isinstance(leaf, Pages)).size
    some, _ = grid(
        mask, queries, keys, q_block=size[0], k_block=size[1], q_offset=q_offset, device=device
    )
    return as_lists(some), size, mask


def as_lists(chosen: Tensor) -> Tensor:
    """Numbers of the chosen blocks of each row, ascending, −1 behind the last."""
    count = chosen.shape[-1]
    numbers = torch.where(chosen, torch.arange(count, device=chosen.device), count).sort(-1).values
    if chosen.device.type == "cpu" and not traced():  # which can be asked how long the longest row is
        numbers = numbers[..., : max(1, int(chosen.sum(-1).max()))]
    return torch.where(numbers == count, -1, numbers).to(torch.int32)
