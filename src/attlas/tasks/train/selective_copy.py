"""Selective copying: symbols lie scattered among noise and are to be said again, in their order.

    · · d · a · · · b ·  ⟶ d a b

Vocabulary: a noise token, a marker, `symbols` symbols. A row is `length` tokens of noise in which
`count` symbols lie at random places, and then `count` markers. Scored: at the i-th marker the i-th
symbol. Ceiling: 100 %.
Source: the task of "Mamba: Linear-Time Sequence Modeling with Selective State Spaces".
"""

from __future__ import annotations

import torch
from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import IGNORED, Batch, Sizes, Task, distinct, integers, task

NOISE, MARKER, FIRST = 0, 1, 2


@task("selective-copy", needs="decoder")
class SelectiveCopy(Task):
    """Symbols among noise."""

    count: int = option("symbols to copy", default=4, at_least=1)
    length: int = option("tokens that they lie among", default=24, at_least=1)
    symbols: int = option("symbols of the vocabulary", default=8, at_least=1)

    def setup(self) -> None:
        """Refuse more symbols than tokens."""
        if self.count > self.length:
            raise ValueError(f"count must lie between 1 and length={self.length}, got {self.count}")

    @property
    def sizes(self) -> Sizes:
        """Noise, marker, symbols."""
        return Sizes(outputs=FIRST + self.symbols, length=self.length + self.count)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Rows of noise with symbols in it, and the markers."""
        places = distinct(rng, self.length, rows, self.count).sort(-1).values
        said = FIRST + integers(rng, 0, self.symbols, rows, self.count)
        noise = torch.full((rows, self.length), NOISE).scatter(1, places, said)
        unasked = torch.full_like(noise, IGNORED)
        return {
            "input_ids": torch.cat([noise, torch.full_like(said, MARKER)], dim=1),
            "targets": torch.cat([unasked, said], dim=1),
        }
