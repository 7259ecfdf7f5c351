"""One needle: pairs of a key and a value, all different, then keys that are asked for their values.

    k3 v7  k1 v2  k8 v8  …   k8 → v8   k3 → v7

Vocabulary: `symbols` names, each of which may be a key or a value, and one token for everything else.
A row has between `fewest` and `pairs` pairs and ends in `asked` of its keys. Scored: at each of these,
its value. Ceiling: 100 %.
Source: the single needle of "Needle Threading: Can LLMs Follow Threads through Near-Million-Scale
Haystacks?", with one token a name; `attlas run needle-threading` reads its haystacks with what is
trained here.
"""

from __future__ import annotations

import torch
from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import IGNORED, Batch, Sizes, Task, distinct, integers, task


@task("one-needle", needs="decoder")
class OneNeedle(Task):
    """Values of keys."""

    fewest: int = option("pairs of a row at least", default=4, at_least=1)
    pairs: int = option("pairs of a row at most", default=8, at_least=1)
    symbols: int = option("names of the vocabulary, at least two a pair", default=32, at_least=2)
    asked: int = option("keys at the end of a row", default=4, at_least=1)

    def setup(self) -> None:
        """Refuse more questions than pairs, and too few names."""
        if not self.asked <= self.fewest <= self.pairs:
            raise ValueError(
                f"asked, fewest and pairs must rise from 1, got {self.asked}, {self.fewest} and "
                f"{self.pairs}"
            )
        if self.symbols < 2 * self.pairs:
            raise ValueError(f"symbols must be at least {2 * self.pairs}, got {self.symbols}")

    @property
    def sizes(self) -> Sizes:
        """One token a key and a value."""
        return Sizes(outputs=self.symbols + 1, length=2 * self.pairs + self.asked)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Rows of one number of pairs."""
        pairs = int(integers(rng, self.fewest, self.pairs + 1, 1))
        told = distinct(rng, self.symbols, rows, 2 * pairs).view(rows, pairs, 2)
        some = distinct(rng, pairs, rows, self.asked)
        ids = torch.cat([told.flatten(1), told[..., 0].gather(1, some)], dim=1)
        targets = torch.full_like(ids, IGNORED)
        targets[:, 2 * pairs :] = told[..., 1].gather(1, some)
        return {"input_ids": ids, "targets": targets}
