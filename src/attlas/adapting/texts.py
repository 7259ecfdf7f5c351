"""What an adapter is trained on, and the held-out text that it is judged by."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attlas.errors import UserError
from attlas.tasks.perplexity import perplexity, surprise
from attlas.tasks.record import Measure
from attlas.tasks.text import shakespeare

#: The share of Shakespeare, at its end, that nothing here trains on.
HELD_OUT = 0.1


class Texts:
    """Token numbers of a text, and pieces of them drawn by seed.

    Args:
        tokenizer: the model's.
        text: to train on; Shakespeare without its held-out end unless given.
        length: tokens of a piece.

    Raises:
        ValueError: the text is shorter than one piece.
    """

    def __init__(self, tokenizer: Any, text: str | None, length: int) -> None:
        whole = shakespeare()
        said = whole[: _border(whole)] if text is None else text
        self.ids, self.length = numbers(tokenizer, said), length
        if len(self.ids) <= length:
            raise UserError(
                f"the text holds {len(self.ids)} tokens, no more than one piece of length={length}"
            )

    def batch(self, rows: int, seed: int, step: int) -> Int[Tensor, "rows length"]:
        """The pieces of a step; the same for the same seed and step."""
        rng = random.Random(f"{seed}/{step}")
        starts = [rng.randrange(len(self.ids) - self.length) for _ in range(rows)]
        return torch.tensor([self.ids[start : start + self.length] for start in starts])


def held_out(tokenizer: Any, tokens: int, length: int) -> list[Int[Tensor, "1 length"]]:
    """Pieces of the end of Shakespeare, evenly spread over it, `tokens` in all.

    Raises:
        ValueError: more tokens than there are.
    """
    whole = shakespeare()
    ids = numbers(tokenizer, whole[_border(whole) :])
    count = -(-tokens // length)
    if count * length > len(ids):
        raise UserError(f"tested takes at most {len(ids)} tokens of this tokenizer, got {tokens}")
    starts = [k * (len(ids) // count) for k in range(count)]
    return [torch.tensor([ids[start : start + length]]) for start in starts]


def judged(model: Any, pieces: Sequence[Int[Tensor, "1 length"]]) -> Measure:
    """Perplexity of the pieces, each read from its beginning."""
    found: list[float] = []
    with torch.no_grad():
        for piece in pieces:
            ids = piece.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            found += surprise(logits, ids[0, 1:]).tolist()
    if not all(map(math.isfinite, found)):
        raise UserError("the model gives logits that are no finite numbers on the held-out text")
    return perplexity(found)


def numbers(tokenizer: Any, text: str) -> list[int]:
    """Token numbers of a text, nothing added."""
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _border(whole: str) -> int:
    return whole.rfind("\n", 0, round((1 - HELD_OUT) * len(whole))) + 1
