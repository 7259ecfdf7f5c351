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

from attlas.catalog.kinds import MASK
from attlas.catalog.registry import mechanism
from attlas.masks.algebra import Mask
from attlas.masks.patterns import blocks, fixed_table, keys, window


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
    count = length // size
    ends = keys({0, count - 1}, count)
    local = window(window_blocks // 2 + 1) | ends | ends.T
    if not random:
        return blocks(local, size)
    return blocks(local | fixed_table(_random_blocks(local, heads, count, random, seed)), size)


def _random_blocks(local: Mask, heads: int, count: int, random: int, seed: int) -> torch.Tensor:
    """[heads, count, count] booleans: `random` blocks a row among those that `local` hides."""
    from attlas.masks.lower import dense

    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(heads, count, count, generator=generator)
    draw = draw.masked_fill(dense(local, count, count)[0], -1.0)
    top = draw.topk(min(random, count), dim=-1)
    chosen = torch.zeros(heads, count, count, dtype=torch.bool)
    return chosen.scatter_(-1, top.indices, top.values >= 0)
