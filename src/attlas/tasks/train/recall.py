"""Multi-query associative recall: pairs of a key and a value, then the keys again, out of order.

    k3 v7  k1 v2  k8 v8  …   ·  k8 → v8  ·  ·  k3 → v7  …

Vocabulary: a filler, `keys` keys and as many values. A row begins with `pairs` different keys, each
followed by a value; after them every key stands once more at a random place among fillers. Scored:
at each of these, the value that followed the key. Ceiling: 100 %.
Source: "Zoology: Measuring and Improving Recall in Efficient Language Models", whose queries lie at
distances drawn from a power law; here all places are equally likely.
"""

from __future__ import annotations

import torch
from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import IGNORED, Batch, Sizes, Task, distinct, integers, task


@task("recall", needs="decoder")
class Recall(Task):
    """Associative recall."""

    pairs: int = option("keys to remember", default=4, at_least=1)
    keys: int = option("keys of the vocabulary", default=4, at_least=1)
    length: int = option("tokens of a row, at least three a pair", default=16, at_least=1)

    def setup(self) -> None:
        """Refuse more pairs than keys, and rows without room for them."""
        if self.pairs > self.keys:
            raise ValueError(f"pairs must lie between 1 and keys={self.keys}, got {self.pairs}")
        if self.length < 3 * self.pairs:
            raise ValueError(f"length must be at least {3 * self.pairs}, got {self.length}")

    @property
    def sizes(self) -> Sizes:
        """A filler, keys and values."""
        return Sizes(outputs=1 + 2 * self.keys, length=self.length)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Rows of pairs and queries."""
        return pairs_and_queries(rng, rows, self.pairs, self.keys, self.length)


def pairs_and_queries(rng: Generator, rows: int, pairs: int, keys: int, length: int) -> Batch:
    """Rows of `length` tokens: the pairs, then every key once more among fillers (token 0)."""
    key = 1 + distinct(rng, keys, rows, pairs)
    value = 1 + keys + integers(rng, 0, keys, rows, pairs)
    told = torch.stack([key, value], dim=-1).flatten(1)
    rest = length - 2 * pairs
    places = distinct(rng, rest, rows, pairs)
    asked = torch.zeros(rows, rest, dtype=torch.long).scatter(1, places, key)
    answers = torch.full((rows, rest), IGNORED).scatter(1, places, value)
    return {
        "input_ids": torch.cat([told, asked], dim=1),
        "targets": torch.cat([torch.full_like(told, IGNORED), answers], dim=1),
    }
