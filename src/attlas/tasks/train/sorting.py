"""Sorting: a list of different numbers, and then the same in ascending order.

    7 2 9 4 ⟶ 2 4 7 9

Vocabulary: `numbers` numbers and a separator. A row is `count` different numbers in random order, the
separator, and the numbers sorted, which the model reads as far as it has to have said them. Scored:
all sorted numbers. Ceiling: 100 %.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, distinct, next_tokens, task


@task("sorting", needs="decoder")
class Sorting(Task):
    """Numbers in order."""

    count: int = option("numbers of a list", default=10, at_least=2)
    numbers: int = option("numbers that there are, at least count", default=32, at_least=2)

    def setup(self) -> None:
        """Refuse too few numbers."""
        if self.count > self.numbers:
            raise ValueError(
                f"count must lie between 2 and numbers={self.numbers}, got {self.count}"
            )

    @property
    def sizes(self) -> Sizes:
        """Numbers and the separator."""
        return Sizes(outputs=self.numbers + 1, length=2 * self.count + 1)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Lists and the sorted lists."""
        given = distinct(rng, self.numbers, rows, self.count)
        return then(given, given.sort(-1).values, separator=self.numbers)


def then(given: Tensor, wanted: Tensor, separator: int) -> Batch:
    """`given`, a separator, and `wanted`, all of which is asked for."""
    tokens = torch.cat([given, torch.full_like(given[:, :1], separator), wanted], dim=1)
    return next_tokens(tokens, (torch.arange(tokens.shape[1]) > given.shape[1]).expand_as(tokens))
