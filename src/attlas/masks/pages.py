"""Pages: lists of key blocks, chosen by a pattern or by what the tokens hold, as a mask.

    visible(b, h, q, k) = k // k_block  in  blocks[b, h, (q − first) // q_block]

What was listed combines with `causal`, `window`, `sinks`, `document` by `&` and `|` as any pattern does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attlas.errors import at_least_one
from attlas.masks.algebra import And, Mask, Reach
from attlas.masks.patterns import ByTensor


class Pages(ByTensor):
    """The pairs of listed blocks; see `pages`, which checks what it is given."""

    def __init__(self, blocks: Tensor, size: tuple[int, int], first: int = 0) -> None:
        super().__init__(blocks, fixed=True)
        self.size, self.first = size, first
        batch, heads = blocks.shape[:2]
        self.batch, self.heads = (batch if batch > 1 else None), (heads if heads > 1 else None)
        #: Made when first asked for: a route that reads the lists themselves never does.
        self._listed: Tensor | None = None
        self._area: Tensor | None = None

    @property
    def listed(self) -> Tensor:
        """Whether each block of keys is listed: booleans [batch, heads, q_blocks, k_blocks]."""
        if self._listed is not None:
            return self._listed
        count = int(self.held.max()) + 1 if self.held.numel() else 0
        # What stands for no block goes into a column of its own, which is cut off.
        at = torch.where(self.held < 0, count, self.held).long()
        table = self.held.new_zeros(*self.held.shape[:3], count + 1, dtype=torch.bool)
        self._listed = table.scatter_(-1, at, True)[..., :count]
        return self._listed

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        table = self.listed.to(q.device)
        rows, columns = table.shape[2:]
        row, column = (q - self.first) // self.size[0], k // self.size[1]
        inside = (q >= self.first) & (row < rows) & (column >= 0) & (column < columns)
        if not columns:
            return inside
        batch = b if self.batch is not None else torch.zeros_like(b)
        head = h if self.heads is not None else torch.zeros_like(h)
        found = table[batch, head, row.clamp(0, rows - 1), column.clamp(0, columns - 1)]
        return found & inside

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        if self._area is None:  # how many listed blocks stand above and left of each corner
            self._area = pad(self.listed.int().cumsum(2).cumsum(3), (1, 0, 1, 0))
        area = self._area.to(q_lo.device)
        rows, columns = area.shape[2] - 1, area.shape[3] - 1
        (above, below), (left, right) = self._cells(q_lo, q_hi, k_lo, k_hi)
        r0, r1 = above.clamp(0, rows), (below + 1).clamp(0, rows)
        c0, c1 = left.clamp(0, columns), (right + 1).clamp(0, columns)
        count = area[:, :, r1, c1] - area[:, :, r0, c1] - area[:, :, r1, c0] + area[:, :, r0, c0]
        return count > 0, count == (below - above + 1) * (right - left + 1)

    def _cells(
        self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """First and last of the blocks that intervals touch: of queries, of keys."""
        rows, columns = self.size
        ends = (x - self.first for x in (q_lo, q_hi))
        above, below = (torch.div(x, rows, rounding_mode="floor") for x in ends)
        return (above, below), (k_lo // columns, k_hi // columns)

    def __repr__(self) -> str:
        return f"pages({tuple(self.held.shape)}, {self.size})"


def pages(blocks: Tensor, size: int | tuple[int, int], *, first: int = 0) -> Mask:
    """The pairs of the blocks that are listed.

    Args:
        blocks: [batch, heads, q_blocks, count], numbers of the key blocks that each block of queries
            meets, ascending, −1 behind the last; batch and heads may be 1. The lists are copied.
        size: tokens of a block, or of a block of queries and of one of keys.
        first: position of the first query that is listed.

    Raises:
        TypeError: lists that are not of whole numbers.
        ValueError: lists of another shape, empty, unsorted or with a block twice; a size below 1.
    """
    check_lists(blocks)
    return Pages(blocks.detach().clone(), sizes(size), first)


def sizes(size: int | tuple[int, int]) -> tuple[int, int]:
    """Queries and keys of a block.

    Raises:
        ValueError: not one or two whole numbers of at least 1.
    """
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"size takes the queries and the keys of a block, got {size!r}")
    return at_least_one("size", pair[0]), at_least_one("size", pair[1])


def check_lists(blocks: Tensor) -> None:
    """Nothing, if lists are well formed.

    Raises:
        TypeError: not of whole numbers.
        ValueError: of another shape, of no block at all, unsorted, or with a block twice.
    """
    if not isinstance(blocks, Tensor) or blocks.is_floating_point() or blocks.dtype == torch.bool:
        got = blocks.dtype if isinstance(blocks, Tensor) else type(blocks).__name__
        raise TypeError(f"blocks takes whole numbers, got {got}")
    if blocks.ndim != 4 or not all(blocks.shape):
        raise ValueError(
            "blocks takes [batch, heads, q_blocks, count], each at least 1, got "
            f"{list(blocks.shape)}"
        )
    here, after = blocks[..., :-1], blocks[..., 1:]
    wrong = torch.stack([
        (blocks < -1).any(), ((here < 0) & (after >= 0)).any(), ((after >= 0) & (after == here)).any(),
        ((after >= 0) & (after < here)).any(),
    ])  # fmt: skip
    told = ("a number below −1", "a block behind −1", "a block twice", "a row that does not ascend")
    for found, what in zip(wrong.tolist(), told, strict=True):
        if found:
            raise ValueError(f"blocks takes ascending numbers with −1 behind the last, got {what}")


def parted(mask: Mask) -> tuple[Pages, Mask | None] | None:
    """(pages, the rest) of a mask that is `pages & rest`; None of any other."""
    if isinstance(mask, Pages):
        return mask, None
    if not isinstance(mask, And):
        return None
    for one, other in ((mask.left, mask.right), (mask.right, mask.left)):
        if (found := parted(one)) is not None and not holds_pages(other):
            pages_, rest = found
            return pages_, other if rest is None else rest & other
    return None


def holds_pages(mask: Mask) -> bool:
    """Whether lists of blocks are in a mask."""
    return any(isinstance(leaf, Pages) for leaf in mask.leaves)
