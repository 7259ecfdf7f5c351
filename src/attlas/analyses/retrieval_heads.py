"""Retrieval heads: those that copy what is asked for out of a long text, token by token.

    i_t = argmax_j A_tj              the key that a head's newest query attends to most, at step t
    a step is copied where i_t lies in the needle and x_{i_t} is the token that step t generates
    score = copied steps / tokens of the needle, averaged over the needles that were found

A needle is found where the answer says more than half of its words. As in the published program a token
that is generated twice counts twice; the paper counts the set of copied tokens. Scores above 0.1 make a
retrieval head. Masking a head, as that program does, puts zero in place of its queries, so that it
attends to all that it may see alike.

Cost: a prompt of each length at each depth, and a few steps behind it, in which one key is kept for each
head. Prompts are read without weights.

Source: "Retrieval Head Mechanistically Explains Long-Context Factuality".
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach.call import Call
from attlas.attach.part import Part
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inspect.runs import Heads, by_layer, greedy
from attlas.kinds.analysis import Analysis, Findings, Scores, Table
from attlas.options import option
from attlas.parts.patch.replace import Replace
from attlas.parts.record.rows import RowRecorder
from attlas.tasks.chat import template, tokens
from attlas.tasks.haystack import Key, correct, single

if TYPE_CHECKING:
    from attlas.inspect.subject import Subject

NEEDLE = "The special magic number for {city} is {number}."
QUESTION = "\n\nWhat is the special magic number for {city}?"
#: Scores above this make a retrieval head, and an answer with more than this share of the needle's words
#: has found it; the paper's.
RETRIEVES, FOUND = 0.1, 0.5


def most_attended(
    weights: Float[Tensor, "*rows keys"],
    keys: Int[Tensor, " keys"] | Int[Tensor, "*#rows keys"],
    count: int,
) -> Int[Tensor, "*rows count"]:
    """The keys of the largest weights, the largest first; of fewer keys the last one is told again."""
    best = weights.topk(min(count, weights.shape[-1]), dim=-1).indices
    best = torch.cat([best, best[..., -1:].expand(*best.shape[:-1], count - best.shape[-1])], dim=-1)
    return keys.expand(weights.shape).gather(-1, best).int()


@mechanism("most-attended", paper="retrieval-heads")
class MostAttended(RowRecorder):
    """Records the columns that each query attends to most, [layers, batch, heads, tokens, count]."""

    count: int = option("how many of each query; the paper's one", default=1, at_least=1, kw_only=False)

    def measure(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Int[Tensor, "batch heads query count"]:
        """The keys of the largest weights."""
        return most_attended(weights, keys if keys.ndim == 1 else keys[:, :, None], self.count)


def copy_scores(
    attended: Int[Tensor, "layers heads steps count"],
    generated: Int[Tensor, " steps"],
    ids: Int[Tensor, " tokens"],
    needle: tuple[int, int],
) -> Float[Tensor, "layers heads"]:
    """Score of each head on one needle.

    Args:
        attended: the most attended keys of each step.
        generated: the token that each step gave.
        ids: the prompt.
        needle: its tokens in the prompt, [first, end).
    """
    first, end = needle
    inside = (attended >= first) & (attended < end)
    there = ids[attended.clamp(0, len(ids) - 1).long()]
    copied = (inside & (there == generated[:, None])).any(dim=-1)
    return copied.sum(dim=-1).float() / (end - first)


def find_needle(ids: Sequence[int], needle: Sequence[int]) -> tuple[int, int]:
    """Where the needle stands, [first, end).

    Where its tokens are other ones in the prompt, behind a space say, it is the first window of its
    length with more than nine tenths of its different tokens, as in the published program.

    Raises:
        ValueError: there is none.
    """
    wanted, length = set(needle), len(needle)
    windows = [ids[first : first + length] for first in range(len(ids) - length + 1)]
    near = (len(wanted.intersection(window)) > 0.9 * len(wanted) for window in windows)
    for fits in ((list(window) == list(needle) for window in windows), near):
        first = next((at for at, fit in enumerate(fits) if fit), None)
        if first is not None:
            return first, first + length
    raise UserError("the prompt does not hold the needle")


def recall(needle: str, answer: str) -> float:
    """Share of the needle's words that the answer says."""
    said = re.findall(r"\w+", answer.lower())
    words = re.findall(r"\w+", needle.lower())
    return sum(min(words.count(w), said.count(w)) for w in set(words)) / len(words)


def masked(model: Any, heads: Heads) -> list[Part]:
    """Parts that put zero in place of the queries of these heads; none for no heads."""
    chosen = {layer: tuple(each) for layer, each in heads.items() if tuple(each)}
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    nothing = torch.zeros(config.num_hidden_layers, 1, 1, 1, 1)
    return [Replace({"q": nothing}, heads=chosen)] if chosen else []


@dataclass(frozen=True)
class Prompt:
    """A question about a needle in a haystack.

    Attributes:
        ids: the prompt.
        needle: its tokens in it, [first, end).
        key: what is asked for.
    """

    ids: Int[Tensor, " tokens"]
    needle: tuple[int, int]
    key: Key

    @property
    def sentence(self) -> str:
        """The needle."""
        return NEEDLE.format(city=self.key.city, number=self.key.number)


def prompts(
    tokenizer: Any, lengths: Iterable[int], depths: int, seed: int = 0, device: Any = None
) -> list[Prompt]:
    """Prompts of each length, a needle in each at one of evenly spaced depths.

    Args:
        tokenizer: of the model; its chat template is used where it has one.
        lengths: tokens of the texts.
        depths: how many, from the beginning to the end.
        seed: of the texts, cities and numbers.
        device: of the ids.
    """
    found = []
    for length in lengths:
        for number in range(depths):
            depth = number / max(depths - 1, 1)
            hidden = single(tokenizer, length, depth, f"retrieval {seed} {length} {number}")
            (key,) = hidden.asked
            question = QUESTION.format(city=key.city) + template(tokenizer).closing
            ids = hidden.context + tokens(tokenizer, question)
            said = NEEDLE.format(city=key.city, number=key.number)
            span = find_needle(ids, tokens(tokenizer, said))
            found.append(Prompt(torch.tensor(ids, device=device), span, key))
    return found


@mechanism("retrieval-heads", example={"lengths": (160,), "depths": 2, "steps": 3, "masked_heads": 2})
class RetrievalHeads(Analysis):
    """Scores how much each head copies from needles hidden in the plays, and masks the best of them."""

    needs = "weights"  # it makes its prompts itself

    lengths: tuple[int, ...] = option("of the texts, in tokens", default=(256, 512, 1024))
    depths: int = option("of the needle in a text of each length; the paper's", default=10, at_least=1)
    steps: int = option("generated tokens at most", default=24, at_least=1)
    masked_heads: int = option(
        "how many of the best heads are masked, and as many others, on new prompts; 0: none", default=0,
        at_least=0,
    )  # fmt: skip

    def check(self, subject: Subject) -> None:
        """Refuse a model without a tokenizer, of which no prompt can be made."""
        if subject.tokenizer is None:
            raise UserError("retrieval-heads needs a tokenizer: Subject(model, tokenizer=...)")

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Answer questions about needles, and see where each head looks meanwhile."""
        asked = self._prompts(subject, subject.seed)
        share = 0.5 if self.masked_heads else 1.0
        scores, found = [], 0
        for done, prompt in enumerate(asked):
            score, answer = self.score(subject, prompt)
            if recall(prompt.sentence, answer) > FOUND:
                scores.append(score)
            found += correct(prompt.key, answer)
            tick(share * (done + 1) / len(asked))
        mean = torch.zeros(subject.layers, subject.heads)
        says = [f"{found} of {len(asked)} needles were found."]
        if scores:
            mean = torch.stack(scores).mean(dim=0)
            heads = int((mean > RETRIEVES).sum())
            says.append(f"{heads} of {mean.numel()} heads score above {RETRIEVES}.")
        else:
            says.append("No answer held its needle: of no head is it known whether it retrieves.")
        told = Scores(mean, "share of a needle that the head copies while it is said")
        tables = []
        if self.masked_heads:
            tables.append(self._masking(subject, told, lambda x: tick(0.5 + 0.5 * x)))
        return Findings(heads={"retrieval": told}, tables=tables, says=says)

    def score(
        self, subject: Subject, prompt: Prompt
    ) -> tuple[Float[Tensor, "layers heads"], str]:
        """(each head's score on one prompt, the answer)."""
        recorder = MostAttended()
        said = self._said(subject, prompt, record=[recorder])
        attended = recorder.result()[:, 0].cpu()
        score = copy_scores(attended, torch.tensor(said), prompt.ids.cpu(), prompt.needle)
        return score, subject.tokenizer.decode(said)

    def found(
        self, subject: Subject, asked: Sequence[Prompt], heads: Iterable[tuple[int, int]]
    ) -> float:
        """Share of numbers that are said rightly with these heads masked."""
        parts = masked(subject.model, by_layer(heads))
        said = [self._said(subject, prompt, parts) for prompt in asked]
        hits = [correct(p.key, subject.tokenizer.decode(s)) for p, s in zip(asked, said, strict=True)]
        return sum(hits) / len(hits)

    def _masking(self, subject: Subject, scores: Scores, tick: Callable[[float], None]) -> Table:
        """What is found on new prompts: as it is, without the best heads, without as many others."""
        asked = self._prompts(subject, subject.seed + 1)
        best = scores.top(self.masked_heads)
        every = [(x, h) for x in range(subject.layers) for h in range(subject.heads)]
        rest = [each for each in every if each not in best]
        others = random.Random(subject.seed).sample(rest, min(len(rest), self.masked_heads))
        rows = []
        for what, heads in (("none", []), ("the best", best), ("others, drawn", others)):
            rows.append((what, len(heads), self.found(subject, asked, heads)))
            tick(len(rows) / 3)
        return Table("Needles found with heads masked", ("masked", "heads", "found"), rows)

    def _prompts(self, subject: Subject, seed: int) -> list[Prompt]:
        return prompts(subject.tokenizer, self.lengths, self.depths, seed, subject.device)

    def _said(
        self, subject: Subject, prompt: Prompt, parts: Iterable[Part] = (), record: Iterable[Any] = ()
    ) -> list[int]:
        end = getattr(subject.tokenizer, "eos_token_id", None)
        stop = [] if end is None else [end]
        return greedy(subject.model, prompt.ids, self.steps, parts, record, stop)

    @classmethod
    def sample(cls) -> Subject:
        """A small Llama that reads single characters."""
        from attlas.contract.analyses import Letters
        from attlas.contract.parts import small_llama
        from attlas.inspect.subject import Subject

        return Subject(small_llama(), tokenizer=Letters())
