"""Haystacks: numbers for cities, hidden in the plays, and how answers are scored.

    context   "... The special magic number for London is 481. ..."
    question  "What is the special magic number for London?"
    score     1 if the first number in the greedy answer is 481, else 0
    digits    share of its digits that are right from the left, up to the first mistake

Three digits, since SmolLM2 reads digits one by one: of a longer number every method that drops tokens
loses some, and exact match tells none from another. The depth is the share of the text that stands
before the needle. Everything follows from the seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from attlas.errors import UserError
from attlas.tasks.chat import line_ends, template, tokens
from attlas.tasks.text import passage

CITIES = (
    "Amsterdam", "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Dublin", "Geneva", "Havana",
    "Istanbul", "Lisbon", "London", "Madrid", "Moscow", "Nairobi", "Oslo", "Paris", "Prague",
    "Rome", "Seattle", "Sydney", "Tokyo", "Toronto", "Vienna",
)  # fmt: skip
NEEDLE = "\nThe special magic number for {city} is {number}.\n"
OPENING = "Read this text and remember the special magic numbers hidden in it.\n\n"
QUESTION = "\n\nWhat is the special magic number for {city} mentioned in the text?"
REPLY = "The special magic number for {city} mentioned in the text is"
ANSWER_TOKENS = 16
KEYS = 4


@dataclass(frozen=True, slots=True)
class Key:
    """One hidden number: where it stands, how it is asked for, what is right."""

    depth: float
    city: str
    number: str
    question: list[int]


@dataclass(frozen=True, slots=True)
class Haystack:
    """A context of exactly the wanted number of tokens and the keys that are asked for."""

    context: list[int]
    asked: list[Key]


def single(tokenizer: Any, length: int, depth: float, seed: str) -> Haystack:
    """A text of `length` tokens with one needle at `depth`."""
    return _haystack(tokenizer, length, [depth], [depth], seed)


def several(tokenizer: Any, length: int, depths: Sequence[float], seed: str) -> Haystack:
    """A text of `length` tokens with a needle at every depth, and more until there are four."""
    places = sorted(depths)
    while len(places) < KEYS:
        edges = [0.0, *places, 1.0]
        left, right = max(pairwise(edges), key=lambda gap: gap[1] - gap[0])
        places = sorted([*places, (left + right) / 2])
    return _haystack(tokenizer, length, places, depths, seed)


def correct(key: Key, answer: str) -> bool:
    """Whether the first number in the answer is the hidden one, digit for digit."""
    found = re.search(r"\d+", answer)
    return found is not None and found.group() == key.number


def digits(key: Key, answer: str) -> float:
    """The share of the hidden number said rightly before the first wrong digit.

    A method that keeps half of a needle says half of its number: this tells it from one that keeps
    nothing, which exact match does not.
    """
    found = re.search(r"\d+", answer)
    said = found.group() if found else ""
    right = next(
        (i for i, (a, b) in enumerate(zip(said, key.number, strict=False)) if a != b), None
    )
    return (min(len(said), len(key.number)) if right is None else right) / len(key.number)


def finished(answer: str) -> bool:
    """Whether a number has been said and something has followed it: more tokens change nothing."""
    return re.search(r"\d\D", answer) is not None


def _haystack(
    tokenizer: Any, length: int, places: Sequence[float], asked: Sequence[float], seed: str
) -> Haystack:
    rng = random.Random(seed)
    frame = template(tokenizer)
    cities = rng.sample(CITIES, len(places))
    numbers = [str(rng.randrange(100, 1000)) for _ in places]
    needles = [
        tokens(tokenizer, NEEDLE.format(city=city, number=number))
        for city, number in zip(cities, numbers, strict=True)
    ]
    opening = tokens(tokenizer, frame.opening + OPENING)
    room = length - len(opening) - sum(map(len, needles))
    if room < len(places):
        raise UserError(
            f"length {length} is too short for {len(places)} needles; "
            f"take at least {length - room + 16}"
        )
    filler = tokens(tokenizer, passage(rng, 8 * length))[:room]
    ends = line_ends(tokenizer, filler)
    cuts = [_nearest(ends, place * room) for place in places]
    context = list(opening)
    for start, stop, needle in zip([0, *cuts], cuts, needles, strict=False):
        context += filler[start:stop] + needle
    context += filler[cuts[-1] :]
    keys = [
        Key(place, city, number, _question(tokenizer, frame.closing, city))
        for place, city, number in zip(places, cities, numbers, strict=True)
        if place in asked
    ]
    return Haystack(context, keys)


def _nearest(ends: list[int], wanted: float) -> int:
    return min(ends, key=lambda end: abs(end - wanted))


def _question(tokenizer: Any, closing: str, city: str) -> list[int]:
    text = QUESTION.format(city=city) + closing + REPLY.format(city=city)
    return tokens(tokenizer, text)
