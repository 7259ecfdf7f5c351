"""The text that fidelity and perplexity share: a context from the plays and what follows it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from attlas.tasks.chat import opening, tokens
from attlas.tasks.text import passage


@dataclass(frozen=True, slots=True)
class Continuation:
    """`context` is compressed; `fed` is fed after it; `targets` are the tokens then predicted."""

    context: list[int]
    fed: list[int]
    targets: list[int]


def continuation(tokenizer: Any, length: int, count: int, seed: str) -> Continuation:
    """A passage of `length` tokens, opened as the model expects, and the `count` predictions after it."""
    text = passage(random.Random(seed), 8 * (length + count + 1))
    ids = (opening(tokenizer) + tokens(tokenizer, text))[: length + count + 1]
    return Continuation(ids[:length], ids[length : length + count], ids[length + 1 :])
