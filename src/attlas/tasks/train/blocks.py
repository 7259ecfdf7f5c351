"""Which block? Blocks of letters, then letters that only one of the blocks holds together.

    a c f h | d a g b | e f c d | ?  g d → d

Vocabulary: `letters` letters, a bar and a question mark. A row is `blocks` blocks of `size` different
letters, each closed by a bar, then `?` and `wanted` letters in random order that stand together in one
block alone. Scored: at the last of them, that block's first letter. One wanted letter alone does not
tell which block it is. Ceiling: 100 %.
Source: the toy task of "Multi-Token Attention", where the block itself is to be written.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from attlas.options import option
from attlas.tasks.train.base import IGNORED, Batch, Sizes, Task, distinct, integers, task

BAR, ASK, FIRST = 0, 1, 2
TRIES = 200


@task("blocks", needs="decoder")
class Blocks(Task):
    """Finding the block that holds all wanted letters."""

    blocks: int = option("blocks of a row", default=6, at_least=2)
    size: int = option("letters of a block", default=4, at_least=1)
    wanted: int = option("letters that are asked for", default=2, at_least=1)
    letters: int = option("letters of the vocabulary", default=16, at_least=1)

    def setup(self) -> None:
        """Refuse letters that do not suffice."""
        if not self.wanted <= self.size <= self.letters:
            raise ValueError(
                "wanted, size and letters must not fall in this order, got "
                f"{self.wanted}, {self.size} and {self.letters}"
            )

    @property
    def sizes(self) -> Sizes:
        """A bar, a question mark and letters."""
        length = self.blocks * (self.size + 1) + 1 + self.wanted
        return Sizes(outputs=FIRST + self.letters, length=length)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Rows of blocks and one question each."""
        held = distinct(rng, self.letters, rows * self.blocks, self.size)
        held = held.unflatten(0, (rows, self.blocks))
        target, wanted = self._question(rng, held)
        bars = torch.full((rows, self.blocks, 1), BAR)
        told = torch.cat([held + FIRST, bars], dim=-1).flatten(1)
        tokens = torch.cat([told, torch.full((rows, 1), ASK), wanted + FIRST], dim=1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, -1] = FIRST + held[torch.arange(rows), target, 0]
        return {"input_ids": tokens, "targets": targets}

    def _question(self, rng: Generator, held: Tensor) -> tuple[Tensor, Tensor]:
        """(block, letters) of each row: drawn again while another block holds them too."""
        rows = len(held)
        target, wanted = torch.zeros(rows, dtype=torch.long), held[:, 0, : self.wanted].clone()
        open_rows = torch.ones(rows, dtype=torch.bool)
        for _ in range(TRIES):
            drawn = integers(rng, 0, self.blocks, rows)
            letters = distinct(rng, self.size, rows, self.wanted)
            asked = held[torch.arange(rows), drawn].gather(1, letters)
            holds = (held[:, :, None, :] == asked[:, None, :, None]).any(-1).all(-1)
            take = open_rows & (holds.sum(-1) == 1)
            target[take], wanted[take] = drawn[take], asked[take]
            open_rows &= ~take
            if not open_rows.any():
                return target, wanted
        raise ValueError(f"blocks={self.blocks} of size={self.size} are too alike to be told apart")
