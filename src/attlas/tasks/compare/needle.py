"""Needle in a haystack: a number for a city, hidden in the plays, asked for afterwards.

    single    one needle in the text; `digits`: the same answers, by digits right from the left
    several   four or more cities at spread depths, alike but for city and number, one of them asked
              at a time: a method must keep all, and not mix them up
    blind     the single needle once more, the question fed after the context was compressed, as when
              one stored document is asked many things: nothing could be foreseen

The question is part of the prompt that is compressed, as in `generate(prompt)` and in SnapKV's paper:
a method may look at what is asked. Texts and scores: `attlas.tasks.haystack`.

After "Needle In A Haystack" (Kamradt, 2023) and "RULER: What's the Real Context Size of Your
Long-Context Language Models?" (Hsieh et al., 2024), whose several-keys task this is in small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attlas.catalog.registry import mechanism
from attlas.compare.methods import Method
from attlas.compare.presets import Preset
from attlas.compare.shared import Reading, forward
from attlas.tasks.compare.base import (
    FOUND,
    Bench,
    CompareTask,
    Context,
    Metric,
    Sample,
    fractions,
    shares,
)
from attlas.tasks.haystack import (
    ANSWER_TOKENS,
    Haystack,
    Key,
    correct,
    digits,
    finished,
    several,
    single,
)
from attlas.tasks.record import fraction, hits


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method said to one key; `blind` where it was asked after compression as well."""

    key: Key
    said: str
    blind: str | None


class _Asked(Context):
    """A text with numbers in it, and questions about them."""

    blind: bool

    def read(
        self, bench: Bench, text: Haystack, methods: Sequence[Method]
    ) -> tuple[Haystack, Reading, list[Reading]]:
        """The text, its prefill, and the prefill with each of the questions behind."""
        reading = Reading.of(bench.model, text.context, methods)
        return text, reading, [reading.extended(key.question) for key in text.asked]

    def observe(
        self,
        bench: Bench,
        read: tuple[Haystack, Reading, list[Reading]],
        method: Method,
        hold: Callable[[Any], int],
    ) -> list[Answer]:
        """The answers to all questions."""
        hay, reading, prompts = read
        answers = []
        with reading.attached(method):
            for key, prompt in zip(hay.asked, prompts, strict=True):
                cache, logits = prompt.fork(method)
                hold(cache)
                said = _answer(bench, cache, logits)
                blind = self._blindly(bench, reading, method, key) if self.blind else None
                answers.append(Answer(key, said, blind))
        return answers

    def _blindly(self, bench: Bench, reading: Reading, method: Method, key: Key) -> str:
        cache, _ = reading.fork(method)
        question = torch.tensor([key.question], device=bench.model.device)
        return _answer(bench, cache, forward(bench.model, question, cache).logits[:, -1])


class OneNeedle(_Asked):
    """One needle at one depth."""

    name, title, blind = "single", "needle", True

    def depths(self, preset: Preset) -> tuple[float | None, ...]:
        """A text for each depth."""
        return preset.depths

    def weight(self, length: int) -> float:
        """Two answers."""
        return 250 + 0.15 * length

    def text(
        self, tokenizer: Any, preset: Preset, length: int, depth: float | None, seed: str
    ) -> Haystack:
        """A haystack with one needle."""
        return single(tokenizer, length, 0.5 if depth is None else depth, seed)


class SeveralNeedles(_Asked):
    """A needle at every depth, all asked for."""

    name, title, blind = "several", "several needles", False

    def asked(self, preset: Preset, depth: float | None) -> tuple[float | None, ...]:
        """All depths of one text."""
        return preset.depths

    def weight(self, length: int) -> float:
        """An answer for each depth."""
        return 750 + 0.15 * length

    def text(
        self, tokenizer: Any, preset: Preset, length: int, depth: float | None, seed: str
    ) -> Haystack:
        """A haystack with several needles."""
        return several(tokenizer, length, preset.depths, seed)


ONE, SEVERAL = OneNeedle(), SeveralNeedles()
_WHERE = "over all lengths and depths"


@mechanism("needle", paper="")
class Needle(CompareTask):
    """Numbers hidden in the plays."""

    metrics = (
        Metric("single", "needle %", FOUND, "higher",
               "one number hidden in the text, asked for in the prompt: answers with every digit right, "
               + _WHERE, ONE, hits, shares, scale=100.0, map="one needle"),
        Metric("digits", "digits %", FOUND, "higher",
               "the same answers: digits that are right before the first mistake, " + _WHERE,
               ONE, fraction, fractions, scale=100.0, drawn="picture"),
        Metric("blind", "blind %", FOUND, "higher",
               "the same number, but the question comes after compression, unforeseen, " + _WHERE,
               ONE, hits, shares, scale=100.0, map="one needle, the question unforeseen"),
        Metric("several", "several %", FOUND, "higher",
               "four or more numbers hidden, one asked for in the prompt: answers with every digit "
               "right, " + _WHERE, SEVERAL, hits, shares, scale=100.0, map="several needles"),
    )  # fmt: skip
    how = (
        "A needle is a sentence such as ‘The special magic number for London is 481.’ between two lines "
        "of the plays. Its depth is the share of the text before it. It is asked for through the "
        "model’s own chat template; the answer is greedy and right only if every digit is. The question "
        "is part of the prompt that is compressed, as when a prompt is simply generated from: a method "
        "may look at what is asked. For the column ‘blind’ the text alone is compressed and the "
        "question comes afterwards, as when one stored document is asked many things."
    )
    maps = (
        "Where needles are found",
        "Share of right answers. To the right, longer texts; downwards, needles further from the text’s "
        "beginning and nearer to the question. Several needles: which of them is asked.",
    )

    def rounds(self, preset: Preset) -> int:
        """Texts of each length and depth."""
        return preset.needles

    def samples(self, context: Context, seen: list[Answer]) -> Iterator[Sample]:
        """Each answer, right or wrong."""
        for answer in seen:
            key = answer.key
            yield context.name, key.depth, correct(key, answer.said)
            if answer.blind is not None:
                yield "digits", key.depth, digits(key, answer.said)
                yield "blind", key.depth, correct(key, answer.blind)


def _answer(bench: Bench, cache: Any, logits: torch.Tensor) -> str:
    """The greedy answer, until a number has been said, the model ends, or it talks too long."""
    ends = getattr(bench.model.generation_config, "eos_token_id", None)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    said: list[int] = []
    text = ""
    while len(said) < ANSWER_TOKENS:
        ids = logits.argmax(-1, keepdim=True)
        token = int(ids)
        if token in ends:
            break
        said.append(token)
        text = bench.tokenizer.decode(said)
        if finished(text):
            break
        logits = forward(bench.model, ids, cache).logits[:, -1]
    return text
