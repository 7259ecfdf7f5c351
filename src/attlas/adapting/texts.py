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
from attlas.tasks.compare.perplexity import perplexity, surprise
from attlas.tasks.record import Measure
from attlas.tasks.text import shakespeare

#: The share of Shakespeare, at its end, that nothing here trains on.
HELD_OUT = 0.1
#: Characters read for each token that is wanted; what is too much is cut off.
CHARACTERS = 8


class Texts:
    """Pieces of a text, drawn by seed.

    Args:
        tokenizer: the model's.
        text: to train on; Shakespeare without its held-out end unless given.
        length: tokens of a piece.

    Raises:
        ValueError: the text is shorter than one piece.
    """

    def __init__(self, tokenizer: Any, text: str | None, length: int) -> None:
        whole = shakespeare()
        self.text = whole[: _border(whole)] if text is None else text
        self.tokenizer, self.length = tokenizer, length
        if len(self.text) <= CHARACTERS * length:
            raise UserError(
                f"the text holds {len(self.text)} characters, too few for pieces of length={length}: "
                f"more than {CHARACTERS * length} are needed"
            )

    def batch(self, rows: int, seed: int, step: int) -> Int[Tensor, "rows length"]:
        """The pieces of a step; the same for the same seed and step."""
        rng, end = random.Random(f"{seed}/{step}"), len(self.text) - CHARACTERS * self.length
        return torch.tensor(
            [
                _piece(self.tokenizer, self.text, rng.randrange(end), self.length)
                for _ in range(rows)
            ]
        )


def held_out(tokenizer: Any, tokens: int, length: int) -> list[Int[Tensor, "1 length"]]:
    """Pieces of the end of Shakespeare, evenly spread over it, `tokens` in all.

    Raises:
        ValueError: more tokens than there are.
    """
    whole = shakespeare()
    text = whole[_border(whole) :]
    count = -(-tokens // length)
    room = len(text) // count
    if room < CHARACTERS * length:
        raise UserError(f"tested takes at most {len(text) // CHARACTERS} tokens, got {tokens}")
    return [torch.tensor([_piece(tokenizer, text, k * room, length)]) for k in range(count)]


def _piece(tokenizer: Any, text: str, place: int, length: int) -> list[int]:
    """The first `length` tokens of the line around a place.

    Raises:
        ValueError: the text there is coded in fewer tokens.
    """
    start = text.rfind("\n", 0, place) + 1
    said = text[start : start + CHARACTERS * length]
    ids: list[int] = tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < length:
        raise UserError(
            f"{len(said)} characters of the text are {len(ids)} tokens of this tokenizer, fewer than "
            f"length={length}; give a smaller --length"
        )
    return ids[:length]


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


def _border(whole: str) -> int:
    return whole.rfind("\n", 0, round((1 - HELD_OUT) * len(whole))) + 1
