"""Language modelling on the works of Shakespeare in tokens of a small byte-pair encoding.

Vocabulary: `tokens` tokens of a byte-level BPE, trained on the spot on the first nine tenths of the
text, the same ones every time. Windows as in `shakespeare-bytes`. Scored: bits a byte, that is the
surprise at the tokens divided by the bytes they stand for, so that the number can be held against
that of `shakespeare-bytes`, whose yardstick it shares.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from attlas.options import option
from attlas.tasks.text import shakespeare
from attlas.tasks.train.base import Batch, Score, Sizes, Task, task
from attlas.tasks.train.shakespeare_bytes import BITS, TRAINED, YARDSTICK, windows


@task("shakespeare-bpe", needs="decoder")
class ShakespeareBPE(Task):
    """Next tokens of the plays."""

    judged: ClassVar[Score] = BITS
    best: ClassVar[float | None] = None
    yardstick: ClassVar[str] = YARDSTICK

    length: int = option("tokens read", default=64, at_least=2, at_most=65536)
    tokens: int = option("tokens of the vocabulary", default=1024, at_least=257, at_most=32768)

    @property
    def sizes(self) -> Sizes:
        """The encoding's tokens."""
        return Sizes(outputs=self.tokens, length=self.length)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Windows of the encoded text."""
        ids, widths = encoded(self.tokens)
        tokens = windows(rng, ids, rows, self.length + 1, split)
        targets = tokens[:, 1:]
        return {"input_ids": tokens[:, :-1], "targets": targets, "bytes": widths[targets].sum(1)}

    def score(self, output: Tensor, batch: Batch) -> tuple[float, int]:
        """Bits, and the bytes that the tokens stand for, which they are of."""
        bits = float(self.loss(output, batch)) / math.log(2)
        return bits, int(batch["bytes"].sum())


@cache
def encoding(tokens: int) -> Any:
    """The byte-pair encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = shakespeare()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator(text[: int(TRAINED * len(text))].splitlines(keepends=True), trainer)
    return made


@cache
def encoded(tokens: int) -> tuple[Tensor, Tensor]:
    """The text as tokens, and the bytes that each token of the vocabulary stands for."""
    tokenizer = encoding(tokens)
    parts = tokenizer.encode_batch(shakespeare().splitlines(keepends=True))
    ids = torch.tensor([i for part in parts for i in part.ids], dtype=torch.int32)
    # In a byte-level vocabulary every byte is written as one sign.
    widths = [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    return ids, torch.tensor(widths)
