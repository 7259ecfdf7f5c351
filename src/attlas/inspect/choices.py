"""Multiple choice: where a prompt's options end, which letter is right, and how often it is said.

    Question: …?⏎A. x⏎B. y⏎C. z⏎D. w⏎Answer:           an option ends with its line
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.errors import UserError
from attlas.inspect.prompts import one_token
from attlas.inspect.tasks import LETTERS


@dataclass(frozen=True)
class Choices:
    """Prompts that ask for a letter.

    Attributes:
        ids: the prompts, [prompts, tokens].
        ends: where the token stands that ends each option, [prompts, options].
        letters: tokens of the options' letters.
        right: which option is, [prompts].
    """

    ids: Int[Tensor, "prompts tokens"]
    ends: Int[Tensor, "prompts options"]
    letters: Int[Tensor, " options"]
    right: Int[Tensor, " prompts"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: slice) -> Choices:
        return Choices(self.ids[chosen], self.ends[chosen], self.letters, self.right[chosen])

    def letter_logits(
        self, logits: Float[Tensor, "prompts tokens vocabulary"]
    ) -> Float[Tensor, "prompts options"]:
        """Logits of the letters behind the prompts."""
        return logits[:, -1, self.letters]


def choices(
    ids: Int[Tensor, "prompts tokens"],
    answers: Int[Tensor, " prompts"],
    letters: Sequence[int],
    mark: int,
) -> Choices:
    """Where the options of prompts end, and which is right.

    Args:
        ids: the prompts.
        answers: the token of each one's right letter.
        letters: tokens of the letters, one for each option.
        mark: the token that ends an option; the last ones of a prompt count.

    Raises:
        ValueError: an answer that is none of the letters, or a prompt of fewer marks than options.
    """
    known = torch.tensor(letters, device=ids.device)
    right = answers[:, None] == known
    if not bool(right.any(dim=1).all()):
        raise UserError(f"the answers {answers.tolist()} are not all among the letters {list(letters)}")
    marks = ids == mark
    if int(marks.sum(dim=1).min()) < len(known):
        raise UserError(f"a prompt has fewer than {len(known)} tokens {mark}, which end its options")
    behind = marks.flip(1).cumsum(dim=1).flip(1)  # marks from here on
    ends = [(marks & (behind == n)).long().argmax(dim=1) for n in range(len(known), 0, -1)]
    return Choices(ids, torch.stack(ends, dim=1), known, right.long().argmax(dim=1))


def spelling(
    tokenizer: Any, letters: Sequence[int] | None, mark: int | None, who: str, count: int = len(LETTERS)
) -> tuple[list[int], int]:
    """Tokens of the letters and of a line's end, those given or the tokenizer's.

    Raises:
        ValueError: neither is there.
    """
    if tokenizer is None and (letters is None or mark is None):
        raise UserError(f"{who} needs a tokenizer, or letters and mark, the tokens of a line's end")
    if letters is None:
        letters = [one_token(f" {letter}", tokenizer) for letter in LETTERS[:count]]
    if mark is None:
        mark = int(tokenizer("\n", add_special_tokens=False)["input_ids"][-1])
    return list(letters), mark


def right_share(
    scores: Float[Tensor, "*heads prompts options"], right: Int[Tensor, " prompts"]
) -> Float[Tensor, "*heads"]:
    """Share of prompts whose right option has the highest score."""
    return (scores.argmax(dim=-1) == right.to(scores.device)).double().mean(dim=-1)
