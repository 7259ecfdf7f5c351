"""Hierarchical pruning: each block of queries descends a tree of keys, and keeps the best of each level.

    cells   w equal cells of the t blocks of keys between the sinks and the recent ones, w = k at first
    round   w ← min(2w, t), every kept cell in two;   score(cell) = max q_i · k_j,  i in the block of
            queries, j in the cell's middle block of keys;   the k best cells go on
    pages   the cells of w = t, the sinks, and what is recent

Key blocks beside each other have scores alike, so that one stands for its cell. The search sees keys
that all queries of the block see. A change of scores by a model (ALiBi, soft caps) is not part of it.
Decoding reads everything.

Cost: 2k keys scored a query and round, log₂(n/k) rounds, and k + sinks + recent keys attended to.
Reduces to full attention where k covers the prompt.

Source: "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas import masks
from attlas.attach.thinned import Text, Thinned
from attlas.catalog.registry import mechanism
from attlas.masks import Mask
from attlas.ops.cells import block_products
from attlas.options import option

#: The block of keys that is scored for a cell: of (cells, how many there are, blocks in all).
Representative: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@mechanism(
    "hip-attention", paper="hip-attention", aliases=("hip",),
    example={"keep": 4, "q_block": 4, "k_block": 1, "sinks": 1, "recent": 4, "dense_layers": ()},
)  # fmt: skip
class HiP(Thinned):
    """Each block of queries reads the keys that a tree search finds, the first ones and the newest."""

    everything: ClassVar[dict[str, Any]] = {"keep": 10**6}
    comparable: ClassVar[tuple[str, ...]] = ("(keep=192)", "(dense_layers=(), keep=96)")

    keep: int = option("tokens that the search keeps for a block of queries", default=512, at_least=1)
    q_block: int = option("tokens of a block of queries", default=32, at_least=1)
    k_block: int = option("tokens of a block of keys", default=2, at_least=1)
    stride: int = option("queries of a block from one that is scored to the next", default=2, at_least=1)
    sinks: int = option("first tokens that all see", default=16, at_least=0)
    recent: int = option(
        "newest tokens that each sees, itself included, beside the rest of their blocks", default=128,
        at_least=0,
    )  # fmt: skip
    representative: Literal["middle", "first"] = option(
        "block of a cell that is scored for it", default="middle"
    )
    dense_layers: tuple[int, ...] = option(
        "layers that stay as they are", default=(0, 1, 2), at_least=0
    )

    def pattern(self, text: Text) -> Mask:
        """The pages of each block of queries."""
        return masks.Pages(self.lists(text), (self.q_block, self.k_block), first=text.offset)

    def lists(self, text: Text) -> Int[Tensor, "batch heads q_blocks count"]:
        """Numbers of the key blocks that each block of queries reads, ascending, −1 behind the last."""
        device, tokens, size = text.q.device, text.k.shape[2], self.k_block
        first = torch.arange(text.offset, tokens, self.q_block, device=device)
        there = -(-(first + self.q_block).clamp(max=tokens) // size)
        sinks = -(-self.sinks // size)
        # Blocks of which the first query of the row sees every key, and none is recent.
        old = ((first - self.recent + 1) // size).clamp(min=0)
        keys = text.k[:, :, sinks * size : tokens // size * size].unflatten(2, (-1, size))
        found = descend(
            in_rows(text.q, self.q_block)[:, :, :, :: self.stride], keys, (old - sinks).clamp(min=0),
            keep=-(-self.keep // size),
            representative={"middle": middle, "first": first_of}[self.representative],
        )  # fmt: skip
        last = int(there.max())
        begin, oldest = torch.arange(sinks, device=device), old.clamp(min=sinks)
        # The newest of each row alone: of all blocks there would be the square of the prompt's length.
        newest = max(0, int((there - oldest).max()))
        end = oldest[:, None] + torch.arange(newest, device=device)
        always = (
            torch.where(begin < there[:, None], begin, -1),
            torch.where(end < there[:, None], end, -1),
        )
        found = torch.where(found >= 0, found + sinks, -1)
        listed = torch.cat([found, *(x.expand(*found.shape[:3], -1) for x in always)], dim=-1)
        listed = torch.where(listed < 0, last, listed).sort(dim=-1).values
        listed = listed[..., : max(1, int((listed < last).sum(-1).max()))]
        return torch.where(listed == last, -1, listed).int()


@torch.no_grad()
def descend(
    q: Float[Tensor, "batch heads rows q_block dim"],
    k: Float[Tensor, "batch kv_heads blocks k_block dim"],
    lengths: Int[Tensor, " rows"],
    *,
    keep: int,
    start: int | None = None,
    fewest: int | None = None,
    growth: float = 2.0,
    representative: Representative | None = None,
) -> Int[Tensor, "batch heads rows cells"]:
    """The blocks of keys that a row of queries finds, ascending, −1 behind the last.

    Args:
        q: queries, in rows that search together.
        k: blocks of keys.
        lengths: blocks, from the first on, that each row may search.
        keep: blocks that are found, where there are as many.
        start: cells of the first level; `keep` unless given.
        fewest: cells that go on from level to level: at least so many, and as many as `keep` is of the
            length; `keep` unless given.
        growth: cells of a level for one of the level before, above 1.
        representative: which block of a cell is scored; the middle one unless given.

    Raises:
        ValueError: a number below 1, or a growth by which no cell becomes two.
    """
    start, fewest = keep if start is None else start, keep if fewest is None else fewest
    for name, value in {"keep": keep, "start": start, "fewest": fewest}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if round(start * growth) <= start:
        raise ValueError(f"growth must make more cells of start={start}, got {growth}")
    length = lengths[:, None]
    longest = int(length.max())
    width = length.clamp(max=start)
    cells = torch.arange(min(start, longest), device=q.device)
    cells = torch.where(cells < width, cells, -1).expand(*q.shape[:3], -1)
    level = start
    while level < longest:
        level = round(level * growth)
        finer = torch.minimum((width * growth).round().long(), length)
        few = (keep * finer // length.clamp(min=keep)).clamp(min=fewest)  # lengths of 0 have no cells
        cells = _split(cells, width, finer)
        if bool(((cells >= 0).sum(-1, keepdim=True) > few).any()):
            at = (representative or middle)(cells, finer.clamp(min=1), length)
            cells = _best(cells, block_products(q, k, at.clamp(min=0)), few)
        width = finer
    return cells


def first_of(cells: Tensor, width: Tensor, length: Tensor) -> Tensor:
    """The first block of each cell."""
    return cells * length // width


def middle(cells: Tensor, width: Tensor, length: Tensor) -> Tensor:
    """The block in the middle of each cell."""
    return (first_of(cells, width, length) + first_of(cells + 1, width, length)) // 2


def in_rows(
    x: Float[Tensor, "batch heads tokens dim"], size: int
) -> Float[Tensor, "batch heads rows size dim"]:
    """Tokens in rows of `size`; the last of them fills up the last row."""
    short = -x.shape[2] % size
    filled = torch.cat([x, x[:, :, -1:].expand(-1, -1, short, -1)], dim=2) if short else x
    rows: Tensor = filled.unflatten(2, (-1, size))
    return rows


def _split(cells: Tensor, width: Tensor, finer: Tensor) -> Tensor:
    """The cells of a finer level that the cells of this one are made of."""
    width = width.clamp(min=1)
    first, last = cells * finer // width, (cells + 1) * finer // width
    most = int(torch.where(cells >= 0, last - first, 0).max())
    parts = first[..., None] + torch.arange(most, device=cells.device)
    there = (parts < last[..., None]) & (cells >= 0)[..., None]
    return torch.where(there, parts, -1).flatten(-2)


def _best(cells: Tensor, scores: Tensor, few: Tensor) -> Tensor:
    """The cells of highest score, as many as each row may keep, ascending."""
    order = scores.masked_fill(cells < 0, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    order = order[..., : int(few.max())]
    kept = cells.gather(-1, order)
    kept = kept.masked_fill(torch.arange(kept.shape[-1], device=cells.device) >= few, -1)
    behind = torch.iinfo(kept.dtype).max
    kept = torch.where(kept < 0, behind, kept).sort(dim=-1).values
    return torch.where(kept == behind, -1, kept)
