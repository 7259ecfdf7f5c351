"""BigBird: local, global and random blocks of keys, so that the cost grows linearly with length.

    visible(q, k) = |i − j| ≤ w//2  or  j global  or  i global  or  random[h, i, j],   i = q//b, j = k//b

The first and the last block are global both ways. Every head draws its own random blocks, from the
seed alone, among those that its query block does not see yet.

Cost: (w + 2 + r) blocks of keys for each query block, O(n); the global query rows add 2·b·n.
Reduces to full attention when the window or the random blocks cover the sequence.
Source: "Big Bird: Transformers for Longer Sequences".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attlas.catalog.kinds import MASK
from attlas.catalog.registry import mechanism
from attlas.masks.algebra import Mask
from attlas.masks.patterns import blocks, fixed_table


@mechanism("bigbird-mask", paper="", kind=MASK, example={"length": 48, "heads": 2, "size": 4})
def bigbird(
    length: int,
    *,
    heads: int = 1,
    size: int = 64,
    window_blocks: int = 3,
    random: int = 3,
    seed: int = 0,
) -> Mask:
    """BigBird's bidirectional pattern for a sequence of `length` tokens.

    Args:
        length: tokens, a multiple of `size`.
        heads: query heads, each with random blocks of its own.
        size: tokens a block.
        window_blocks: blocks of the local window, odd: the own block and as many on each side.
        random: random key blocks a query block.
        seed: of the random blocks.

    Raises:
        ValueError: a length that is no multiple of the block, or an even window.
    """
    for name, value in {"length": length, "heads": heads, "size": size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if random < 0:
        raise ValueError(f"random must be at least 0, got {random}")
    if length % size:
        raise ValueError(f"length must be a multiple of size={size}, got {length}")
    if window_blocks % 2 == 0 or window_blocks < 1:
        raise ValueError(f"window_blocks must be odd, got {window_blocks}")
    table = block_table(
        torch.tensor([length // size]), length // size, heads=heads if random else 1,
        window=window_blocks, random=random, seed=seed,
    )  # fmt: skip
    return blocks(fixed_table(table[0]), size)


def block_table(
    counts: Int[Tensor, " rows"], columns: int, *, heads: int, window: int, random: int, seed: int,
    ends: bool = True, some: slice = slice(None),
) -> Bool[Tensor, "rows heads q_blocks columns"]:  # fmt: skip
    """Which blocks of keys each block of queries sees, in rows that have so many blocks.

    What is drawn for a block of queries hangs on the seed and on the blocks that its row has, and so not
    on the rows beside it.

    Args:
        counts: blocks of each row.
        columns: blocks of the longest.
        heads: each draws for itself.
        window: blocks of the local window, odd.
        random: blocks that are drawn.
        seed: of the draw.
        ends: whether the first and the last block see all and are seen by all.
        some: blocks of queries that are asked for.
    """
    at = torch.arange(columns, device=counts.device)
    i, j, count = at[some, None], at, counts[:, None, None, None]
    local = ((i - j).abs() <= window // 2).expand(1, 1, -1, -1)
    if ends:
        local = local | (i == 0) | (j == 0) | (i == count - 1) | (j == count - 1)
    there = (i < count) & (j < count)
    free = there & ~local
    if not random or not columns:
        return (local & there).expand(len(counts), heads, -1, -1)
    order = torch.where(free, _draw(heads, at[some], at, seed), -1)
    best = order.topk(min(random, columns), dim=-1)
    drawn = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, best.indices, best.values >= 0)
    return (local & there) | drawn


def _draw(
    heads: int, rows: Int[Tensor, " rows"], columns: Int[Tensor, " columns"], seed: int
) -> Int[Tensor, "heads rows columns"]:
    """A number from 0 on for every head and pair of blocks, which hangs on nothing else."""
    head = torch.arange(heads, device=rows.device)
    x = torch.full((heads, len(rows), len(columns)), seed + 1, device=rows.device)
    for part in (head[:, None, None], rows[:, None], columns):
        # Odd factors and shifts of a 64-bit mixer; products wrap around.
        x = (x ^ part) * -7046029254386353131
        x = (x ^ ((x >> 29) & 0x7FFFFFFFF)) * -4658895280553007687
        x = x ^ ((x >> 32) & 0xFFFFFFFF)
    return x & 0x7FFFFFFFFFFFFFFF
