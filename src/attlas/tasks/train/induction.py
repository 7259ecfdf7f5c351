"""Induction: a random string that stands twice; the second time every next token is known.

    c a f b  c → a → f → b

Vocabulary: `symbols` symbols. A row is `half` different symbols in random order, and the same again.
Scored: the next token from the second string's first symbol on. Ceiling: 100 %, since no symbol
stands twice in a string.
Source: the repeated strings of "In-context Learning and Induction Heads".
"""

from __future__ import annotations

import torch
from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, distinct, next_tokens, task


@task("induction", needs="decoder")
class Induction(Task):
    """A string and its repetition."""

    half: int = option("symbols of the string", default=16, at_least=2)
    symbols: int = option("symbols of the vocabulary, at least half", default=32, at_least=2)

    def setup(self) -> None:
        """Refuse too few symbols."""
        if self.half > self.symbols:
            raise ValueError(f"half must lie between 2 and symbols={self.symbols}, got {self.half}")

    @property
    def sizes(self) -> Sizes:
        """Two strings."""
        return Sizes(outputs=self.symbols, length=2 * self.half)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Strings of different symbols, twice."""
        string = distinct(rng, self.symbols, rows, self.half)
        tokens = torch.cat([string, string], dim=1)
        return next_tokens(tokens, (torch.arange(2 * self.half) > self.half).expand_as(tokens))
