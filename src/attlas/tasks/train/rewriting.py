"""Recall of what was written last: keys are given new values, and asked for when all is written.

    k3 v7  k1 v2  k3 v5  …   ·  k3 → v5  ·  ·  k1 → v2  …

Vocabulary: as `recall`. A row begins with `writes` pairs of a key and a value, in which each of `pairs`
keys comes about equally often and at least once; then every one of them stands once more among fillers.
Scored: the value that the key was given last. A sum of all that was written under a key cannot tell;
a state that replaces it can. Ceiling: 100 %.
Source: the task is a form of associative recall that "Linear Transformers Are Secretly Fast Weight
Programmers" (its setting with replacement) holds updates against each other with.
"""

from __future__ import annotations

import torch
from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import IGNORED, Batch, Sizes, Task, distinct, integers, task


@task("rewriting", needs="decoder")
class Rewriting(Task):
    """Associative recall with values that are overwritten."""

    pairs: int = option("keys to remember", default=4, at_least=1)
    writes: int = option(
        "pairs of a key and a value, at least as many as pairs", default=12, at_least=1
    )
    keys: int = option("keys of the vocabulary", default=4, at_least=1)
    length: int = option(
        "tokens of a row, at least two a write and one a pair", default=32, at_least=1
    )

    def setup(self) -> None:
        """Refuse more pairs than keys or writes, and rows without room for them."""
        most = min(self.keys, self.writes)
        if self.pairs > most:
            raise ValueError(f"pairs must lie between 1 and {most}, got {self.pairs}")
        least = 2 * self.writes + self.pairs
        if self.length < least:
            raise ValueError(f"length must be at least {least}, got {self.length}")

    @property
    def sizes(self) -> Sizes:
        """A filler, keys and values."""
        return Sizes(outputs=1 + 2 * self.keys, length=self.length)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Rows of writes and queries."""
        key = distinct(rng, self.keys, rows, self.pairs)
        order = distinct(rng, self.writes, rows, self.writes)
        which = order % self.pairs  # every key, in a random order
        value = integers(rng, 0, self.keys, rows, self.writes)
        times = torch.arange(self.writes).expand(rows, -1)
        last = torch.zeros_like(key).scatter_reduce(1, which, times, "amax")
        told = torch.stack([1 + key.gather(1, which), 1 + self.keys + value], dim=-1).flatten(1)
        rest = self.length - 2 * self.writes
        places = distinct(rng, rest, rows, self.pairs)
        asked = torch.zeros(rows, rest, dtype=torch.long).scatter(1, places, 1 + key)
        answers = torch.full((rows, rest), IGNORED)
        answers = answers.scatter(1, places, 1 + self.keys + value.gather(1, last))
        return {
            "input_ids": torch.cat([told, asked], dim=1),
            "targets": torch.cat([torch.full_like(told, IGNORED), answers], dim=1),
        }
