"""Needles in noise: a few marked pairs among many unmarked ones that look the same.

    k4 v1  k2 v9  ! k4 v6  k7 v3  k4 v2  …  ? k4 → v6

Vocabulary: `!`, `?`, `keys` keys and as many values. A row is a stretch of random pairs, in which
`needles` pairs with different keys are marked by `!`; their keys stand unmarked as well, with other
values. Then every marked key is asked for: `? k`, answered by the marked value. Scored: the answers.
Stretches are trained at all lengths and tested at each. Ceiling: 100 %.
Source: the claim of "Differential Transformer", that it gives less weight to context that does not
matter; the paper retrieves several needles from long texts.
"""

from __future__ import annotations

import torch
from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import IGNORED, Batch, Sizes, Task, distinct, integers, task

MARK, ASK, FIRST = 0, 1, 2
TIMES = (1, 2, 4)


@task("noise", needs="decoder")
class Noise(Task):
    """Marked pairs among unmarked ones."""

    needles: int = option("marked pairs", default=2, at_least=1)
    pairs: int = option(
        "unmarked pairs of the shortest stretch; the others have 2 and 4 times as many",
        default=8,
        at_least=1,
    )
    keys: int = option("keys of the vocabulary", default=8, at_least=1)

    def setup(self) -> None:
        """Refuse more needles than there are keys, or unmarked pairs."""
        if self.needles > min(self.keys, self.pairs):
            raise ValueError(
                f"needles must lie between 1 and keys={self.keys} and pairs={self.pairs}, "
                f"got {self.needles}"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """By the number of unmarked pairs."""
        return tuple(f"{times * self.pairs} pairs" for times in TIMES)

    @property
    def sizes(self) -> Sizes:
        """Room for the longest stretch and the questions."""
        return Sizes(
            outputs=FIRST + 2 * self.keys,
            length=2 * TIMES[-1] * self.pairs + 6 * self.needles,
        )

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Rows of one length, drawn in training."""
        times = TIMES[int(integers(rng, 0, len(TIMES), 1))]
        pairs = times * self.pairs if split == "train" else int(split.split()[0])
        key = FIRST + integers(rng, 0, self.keys, rows, pairs + self.needles)
        value = FIRST + self.keys + integers(rng, 0, self.keys, rows, pairs + self.needles)
        asked = FIRST + distinct(rng, self.keys, rows, self.needles)
        places = distinct(rng, pairs + self.needles, rows, 2 * self.needles)
        marked, decoys = places.chunk(2, -1)
        key = key.scatter(1, marked, asked).scatter(1, decoys, asked)
        is_marked = torch.zeros(rows, pairs + self.needles, dtype=torch.bool).scatter(
            1, marked, True
        )
        answer = value.gather(1, marked)
        # Each pair takes two tokens, a marked one three: where they begin follows from a sum.
        begin = (2 + is_marked.long()).cumsum(1) - 2
        length = 2 * (pairs + self.needles) + self.needles
        told = torch.full((rows, length), MARK).scatter(1, begin, key).scatter(1, begin + 1, value)
        order = distinct(rng, self.needles, rows, self.needles)
        asked, answer = asked.gather(1, order), answer.gather(1, order)
        question = torch.stack([torch.full_like(asked, ASK), asked], dim=-1).flatten(1)
        wanted = torch.stack([torch.full_like(answer, IGNORED), answer], dim=-1).flatten(1)
        return {
            "input_ids": torch.cat([told, question], dim=1),
            "targets": torch.cat([torch.full_like(told, IGNORED), wanted], dim=1),
        }
