"""Pairs of prompts that differ in what decides the answer, and how a model's answer is scored.

    LD = logit(right) − logit(wrong) at the last token

A pair has a clean prompt, whose right answer is the first of two, and a corrupted twin of the same
length, whose right answer is not. What a patched run restores of the clean answer is

    effect = (LD − LD_corrupted) / (LD_clean − LD_corrupted)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.errors import UserError


@dataclass(frozen=True)
class Pair:
    """Two prompts in words.

    Attributes:
        clean: the prompt.
        corrupted: its twin.
        right: what goes on behind the clean prompt, a word of one token with its space.
        wrong: what would behind the corrupted one.
    """

    clean: str
    corrupted: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Prompts:
    """Pairs as token ids, all of one length.

    Attributes:
        clean: [pairs, tokens].
        corrupted: [pairs, tokens].
        answers: right and wrong, [pairs, 2].
        name: of the task.
    """

    clean: Int[Tensor, "pairs tokens"]
    corrupted: Int[Tensor, "pairs tokens"]
    answers: Int[Tensor, "pairs 2"]
    name: str = "prompts"

    def to(self, device: torch.device) -> Prompts:
        """The same on a device."""
        clean, corrupted, answers = (x.to(device) for x in (self.clean, self.corrupted, self.answers))
        return Prompts(clean, corrupted, answers, self.name)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, chosen: slice) -> Prompts:
        return Prompts(self.clean[chosen], self.corrupted[chosen], self.answers[chosen], self.name)


def spelled(pairs: Sequence[Pair], tokenizer: Any, name: str = "prompts") -> Prompts:
    """Pairs as token ids.

    Raises:
        ValueError: an answer that the tokenizer spells in several tokens, answers that begin alike, or
            prompts that are not of one length.
    """
    if not pairs:
        raise UserError(f"{name} has no pair of prompts")
    rows, answers = [], []
    for pair in pairs:
        ids = [tokenizer(text)["input_ids"] for text in (pair.clean, pair.corrupted)]
        rows.append(ids)
        answers.append([one_token(word, tokenizer) for word in (pair.right, pair.wrong)])
        if answers[-1][0] == answers[-1][1]:
            raise UserError(f"{name}: {pair.right!r} and {pair.wrong!r} are the same token")
    lengths = {len(ids) for row in rows for ids in row}
    if len(lengths) != 1:
        raise UserError(
            f"{name}: the prompts have {sorted(lengths)} tokens; all must be of one length, such as "
            f"{pairs[0].clean!r}"
        )
    clean, corrupted = (torch.tensor([row[k] for row in rows]) for k in (0, 1))
    return Prompts(clean, corrupted, torch.tensor(answers), name)


def one_token(word: str, tokenizer: Any) -> int:
    """The token of a word with its leading space.

    Raises:
        ValueError: the tokenizer spells it in several.
    """
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(
            f"the tokenizer spells {word!r} in {len(ids)} tokens; this task needs words of one token"
        )
    return int(ids[0])


def logit_difference(
    logits: Float[Tensor, "pairs tokens vocabulary"], answers: Int[Tensor, "pairs 2"]
) -> Float[Tensor, " pairs"]:
    """LD of every pair, from the logits of its last token."""
    last = logits[:, -1].gather(-1, answers)
    return last[:, 0] - last[:, 1]


def effect(
    patched: Float[Tensor, "*runs"], clean: Float[Tensor, "*#runs"], corrupted: Float[Tensor, "*#runs"]
) -> Float[Tensor, "*runs"]:
    """(patched − corrupted) / (clean − corrupted): 1 where the clean answer is restored, 0 where not.

    Raises:
        ValueError: clean and corrupted do not differ, so that there is nothing to restore.
    """
    room = clean - corrupted
    if bool((room == 0).any()):
        raise UserError("clean and corrupted runs give the same logit difference; take other prompts")
    return (patched - corrupted) / room
