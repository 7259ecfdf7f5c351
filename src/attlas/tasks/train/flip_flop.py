"""Flip-flop: one bit of memory, written, read, and left alone for long stretches.

    w 1  i 0  i 1  r → 1  i 0  w 0  r → 0

Vocabulary: write, ignore, read, 0, 1. A row is `steps` pairs of an instruction and a bit; it begins
with a write. The bit after a read is the last written one, every other bit is random. Ignores have
probability `ignore`, writes and reads share the rest. Scored: the bits after reads. Ceiling: 100 %,
also in the splits `sparse` (ignore 0.98) and `dense` (0.1), which training never shows.
Source: "Exposing Attention Glitches with Flip-Flop Language Modeling".
"""

from __future__ import annotations

import torch
from torch import Generator

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, integers, next_tokens, task

WRITE, IGNORE, READ, ZERO = 0, 1, 2, 3
OTHERS = {"sparse": 0.98, "dense": 0.1}


@task("flip-flop", needs="decoder")
class FlipFlop(Task):
    """One bit."""

    steps: int = option("instructions of a row", default=32, at_least=2)
    ignore: float = option("probability of an ignore", default=0.8, at_least=0, below=1)

    @property
    def splits(self) -> tuple[str, ...]:
        """As trained, and with more and with fewer ignores."""
        return ("test", *OTHERS)

    @property
    def sizes(self) -> Sizes:
        """Instructions and bits."""
        return Sizes(outputs=ZERO + 2, length=2 * self.steps)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Rows of instructions with their bits; the last instruction is a read."""
        ignore = OTHERS.get(split, self.ignore)
        chance = torch.rand(rows, self.steps, generator=rng)
        instruction = torch.where(chance < ignore, IGNORE, READ)
        instruction[chance > (1 + ignore) / 2] = WRITE
        instruction[:, 0], instruction[:, -1] = WRITE, READ
        bits = integers(rng, 0, 2, rows, self.steps)
        writes = torch.where(instruction == WRITE, torch.arange(self.steps), 0)
        last = writes.cummax(dim=1).values
        bits = torch.where(instruction == READ, bits.gather(1, last), bits)
        tokens = torch.stack([instruction, ZERO + bits], dim=-1).flatten(1)
        asked = torch.stack([torch.zeros_like(bits), instruction == READ], dim=-1).flatten(1).bool()
        return next_tokens(tokens, asked)
