"""Language modelling on the works of Shakespeare, byte by byte.

Vocabulary: 256 bytes. Training draws windows from the first nine tenths of the file, the test from
the last. Scored: bits a byte of every byte after the first. No floor is known; `xz -9` packs the
whole file to 2.52 bits a byte, and Shannon's readers guessed printed English at about 1.3 bits a
letter ("Prediction and Entropy of Printed English", upper bound).
"""

from __future__ import annotations

import math
from functools import cache
from typing import ClassVar

import torch
from torch import Generator, Tensor

from attlas.options import option
from attlas.tasks.text import shakespeare
from attlas.tasks.train.base import Batch, Score, Sizes, Task, integers, task

TRAINED = 0.9
YARDSTICK = "no floor is known; xz packs the text to 2.52 bits a byte"
BITS = Score("bits a byte", "lower", 1.0, 3)


@task("shakespeare-bytes", needs="decoder")
class ShakespeareBytes(Task):
    """Next bytes of the plays."""

    judged: ClassVar[Score] = BITS
    best: ClassVar[float | None] = None
    yardstick: ClassVar[str] = YARDSTICK

    length: int = option("bytes read", default=128, at_least=2, at_most=65536)

    @property
    def sizes(self) -> Sizes:
        """Bytes."""
        return Sizes(outputs=256, length=self.length)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Windows of the text."""
        tokens = windows(rng, text_bytes(), rows, self.length + 1, split)
        return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}

    def score(self, output: Tensor, batch: Batch) -> tuple[float, int]:
        """Bits, and the bytes that they are of."""
        bits = float(self.loss(output, batch)) / math.log(2)
        return bits, self.terms(batch)


@cache
def text_bytes() -> Tensor:
    """The whole text."""
    return torch.frombuffer(bytearray(shakespeare().encode()), dtype=torch.uint8)


def windows(rng: Generator, text: Tensor, rows: int, width: int, split: str) -> Tensor:
    """Windows from the part of the text that belongs to the split."""
    edge = int(TRAINED * len(text))
    low, high = (0, edge) if split == "train" else (edge, len(text))
    starts = integers(rng, low, high - width + 1, rows, 1)
    return text[starts + torch.arange(width)].long()
