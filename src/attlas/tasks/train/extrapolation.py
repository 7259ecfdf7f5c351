"""Trained short, tested long: associative recall whose pairs move out of reach.

Vocabulary: as `recall`. Rows are trained at `length` tokens and tested at 1, 2, 4 and 8 times as
many: the same number of pairs, but queries that lie further from them, at positions that training
never saw. Scored: the values. Ceiling: 100 % at every length.
Source: the question is that of "Train Short, Test Long: Attention with Linear Biases Enables Input
Length Extrapolation", which asks it of language modelling.
"""

from __future__ import annotations

from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, task
from attlas.tasks.train.recall import Recall, pairs_and_queries


@task("extrapolation", needs="decoder")
class Extrapolation(Task):
    """Recall beyond the trained length."""

    length: int = option("tokens of a row in training", default=16, at_least=1)
    pairs: int = option("keys to remember", default=4, at_least=1)
    keys: int = option("keys of the vocabulary", default=4, at_least=1)

    def setup(self) -> None:
        """Refuse what `recall` refuses."""
        Recall(pairs=self.pairs, keys=self.keys, length=self.length)

    @property
    def splits(self) -> tuple[str, ...]:
        """The lengths."""
        return tuple(f"{times * self.length} tokens" for times in (1, 2, 4, 8))

    @property
    def sizes(self) -> Sizes:
        """Room for the longest."""
        return Sizes(outputs=1 + 2 * self.keys, length=8 * self.length)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Rows of the trained length, or of the split's."""
        length = self.length if split == "train" else int(split.split()[0])
        return pairs_and_queries(rng, rows, self.pairs, self.keys, length)
