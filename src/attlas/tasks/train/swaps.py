"""State tracking: items change places, two at a time; which one stands first?

    (1 2) → b   (2 3) → b   (1 3) → c   …

`items` items stand in a row. Vocabulary: a token for each pair of places, whose items are exchanged.
Scored, after every token: the item in the first place. That is the word problem of the symmetric
group: order matters, and no fixed number of sums over the tokens decides it. Tested at the trained
length and at twice as many tokens. Ceiling: 100 %.
Source: the question is that of "The Illusion of State in State-Space Models"; swaps are what RWKV-7 shows
that its state can do.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, integers, task

LONGER = "twice as long"


@task("swaps", needs="decoder")
class Swaps(Task):
    """Permutations made of swaps."""

    items: int = option("in a row, at least 2", default=3, at_least=2)
    length: int = option("swaps of a row in training", default=16, at_least=1)

    @property
    def splits(self) -> tuple[str, ...]:
        """As trained, and longer."""
        return ("test", LONGER)

    @property
    def sizes(self) -> Sizes:
        """Items are answers, swaps tokens."""
        swaps = self.items * (self.items - 1) // 2
        return Sizes(outputs=max(self.items, swaps), length=2 * self.length)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Rows of swaps, and the item that stands first after each."""
        length = self.length * (2 if split == LONGER else 1)
        pairs = torch.tensor(list(combinations(range(self.items), 2)))
        tokens = integers(rng, 0, len(pairs), rows, length)
        places = torch.arange(self.items).repeat(rows, 1)
        first = []
        for step in tokens.unbind(1):
            pair = pairs[step]
            places = places.scatter(1, pair, places.gather(1, pair.flip(1)))
            first.append(places[:, 0])
        return {"input_ids": tokens, "targets": torch.stack(first, dim=1)}
