"""Counting: how many increments since the last reset? Positions by context, not by token.

    set  pass  inc  pass  inc  print → 2  set  inc  print → 1

Vocabulary: set, inc, pass, print. A row begins with a set; each further token is a set, an inc or a
print with probability 0.05, 0.25, 0.1, and otherwise a pass. Scored: at every print, the number of
incs since the last set; `most` stands for that many or more. The last token is a print. Ceiling:
100 %, also in the split `more passes`, where three quarters of these operations become passes, so
that the same counts lie further back than training showed.
Source: the counting task of "Contextual Position Encoding: Learning to Count What's Important", with
one variable and its operations as single tokens.
"""

from __future__ import annotations

import torch
from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import IGNORED, Batch, Sizes, Task, task

SET, INC, PASS, PRINT = range(4)
SHARES = (0.05, 0.25, 0.6, 0.1)


@task("counting", needs="decoder")
class Counting(Task):
    """Increments since the last reset."""

    length: int = option("tokens of a row", default=48, at_least=2)
    most: int = option("the largest count that is told apart", default=9, at_least=1)

    @property
    def splits(self) -> tuple[str, ...]:
        """As trained, and with more passes."""
        return ("test", "more passes")

    @property
    def sizes(self) -> Sizes:
        """Counts are answers; the four operations are read."""
        return Sizes(outputs=max(4, self.most + 1), length=self.length)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Rows of operations."""
        shares = torch.tensor(SHARES)
        if split == "more passes":
            shares = shares / 4
            shares[PASS] = 1 - (shares.sum() - shares[PASS])
        tokens = torch.multinomial(shares, rows * self.length, True, generator=rng)
        tokens = tokens.view(rows, self.length)
        tokens[:, 0], tokens[:, -1] = SET, PRINT
        counted = (tokens == INC).cumsum(1)
        at_set = torch.where(tokens == SET, counted, 0).cummax(dim=1).values
        count = (counted - at_set).clamp(max=self.most)
        return {"input_ids": tokens, "targets": torch.where(tokens == PRINT, count, IGNORED)}
