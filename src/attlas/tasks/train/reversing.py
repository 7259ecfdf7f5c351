"""Reversing: a string, and then the same from its end to its beginning.

    a c b b ⟶ b b c a

Vocabulary: `symbols` symbols and a separator. A row is `count` random symbols, the separator, and the
symbols backwards. Scored: all symbols after the separator. Ceiling: 100 %.
"""

from __future__ import annotations

from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, integers, task
from attlas.tasks.train.sorting import then


@task("reversing", needs="decoder")
class Reversing(Task):
    """A string backwards."""

    count: int = option("symbols of a string", default=12, at_least=2)
    symbols: int = option("symbols of the vocabulary", default=10, at_least=2)

    @property
    def sizes(self) -> Sizes:
        """Symbols and the separator."""
        return Sizes(outputs=self.symbols + 1, length=2 * self.count + 1)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Strings and the same backwards."""
        given = integers(rng, 0, self.symbols, rows, self.count)
        return then(given, given.flip(-1), separator=self.symbols)
