"""Numbers read out digit by digit, written down again: what was heard, from left to right.

    "three zero nine"  ⟶  "309"

Vocabulary: as `dates`. A number of `least` to `most` random digits is spelt in words. Scored: every
digit and the end, the right ones before being given. Ceiling: 100 %, also for the splits with 2 and 4
times `most` digits, which only an alignment that moves on by itself can follow: content alone does
not tell one "nine" from the next.
Source: the task stands for the long utterances of "Location-Relative Attention Mechanisms for Robust
Long-Form Speech Synthesis".
"""

from __future__ import annotations

from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, integers, task
from attlas.tasks.train.spelling import COUNT, translation

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@task("numbers", needs="seq2seq")
class Numbers(Task):
    """Digits from words."""

    most: int = option("digits of the longest number in training", default=6, at_least=1)
    least: int = option("digits of the shortest number in training", default=2, at_least=1)

    def setup(self) -> None:
        """Refuse numbers that no length has."""
        if self.least > self.most:
            raise ValueError(f"least must lie between 1 and most={self.most}, got {self.least}")

    @property
    def splits(self) -> tuple[str, ...]:
        """As trained, and longer."""
        return ("test", f"{2 * self.most} digits", f"{4 * self.most} digits")

    @property
    def sizes(self) -> Sizes:
        """Room for the longest number in words of five letters and a space."""
        return Sizes(outputs=COUNT, length=4 * self.most * 6, source=COUNT)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Numbers in words and in digits."""
        if split.endswith("digits"):
            counts = [int(split.split()[0])] * rows
        else:
            counts = integers(rng, self.least, self.most + 1, rows).tolist()
        digits = integers(rng, 0, 10, rows, max(counts)).tolist()
        said = [row[:count] for row, count in zip(digits, counts, strict=True)]
        return translation(
            [" ".join(_WORDS[d] for d in row) for row in said],
            ["".join(map(str, row)) for row in said],
        )
