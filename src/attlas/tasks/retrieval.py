"""Retrieval: a query, and documents of which one holds the passage that the query was drawn from.

    query       words of a passage of the plays, in their order
    relevant    ... plays ... the passage ... plays ...          the passage at any depth
    others      ... plays ...
    all         hold each word of the query once more, wherever it falls

The words that are strewn about are as many in the relevant document as in the others: what stands before
the passage tells nothing. Training and test draw from different plays. All follows from the seed.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from attlas.errors import UserError
from attlas.tasks.text import shakespeare

#: Queries are of rarer words than these many most frequent ones.
COMMON = 200
#: Share of the text that training reads; tests read the rest.
TRAINED = 0.8

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Candidates:
    """A query and the documents to rank."""

    query: Words
    documents: tuple[Words, ...]


class Sizes(NamedTuple):
    """How long things are, in words."""

    document: int
    passage: int = 30
    query: int = 4
    documents: int = 10


@cache
def corpus() -> Words:
    """The plays as words in small letters."""
    return tuple(re.findall(r"[a-z']+", shakespeare().lower()))


@cache
def ranks() -> dict[str, int]:
    """Every word's place in the order of frequency, from 0."""
    counted = Counter(corpus())
    return {word: rank for rank, (word, _) in enumerate(counted.most_common())}


def candidates(
    rng: random.Random, sizes: Sizes, split: str, first: int = 0
) -> tuple[Candidates, int]:
    """(query and documents, which of them is relevant).

    Args:
        rng: decides everything.
        sizes: of documents, passage and query.
        split: train or test.
        first: words of the relevant document that stand before its passage at least.

    Raises:
        ValueError: documents too short for what should stand in them.
    """
    room = sizes.document - first - sizes.passage
    if room < 0 or sizes.document < sizes.passage + sizes.query:
        raise UserError(
            f"documents of {sizes.document} words are too short for a passage of {sizes.passage} behind "
            f"{first} words and {sizes.query} more; take at least {first + sizes.passage + sizes.query}"
        )
    passage, query = _passage(rng, sizes, split)
    relevant = rng.randrange(sizes.documents)
    documents = []
    for number in range(sizes.documents):
        if number != relevant:
            documents.append(_strewn(rng, _run(rng, sizes.document, split), query))
            continue
        rest = _strewn(rng, _run(rng, sizes.document - len(passage), split), query)
        place = first + rng.randint(0, room)
        documents.append([*rest[:place], *passage, *rest[place:]])
    return Candidates(query, tuple(map(tuple, documents))), relevant


def _passage(rng: random.Random, sizes: Sizes, split: str) -> tuple[list[str], Words]:
    """(a passage with enough rare words, those of them that are asked for)."""
    while True:
        passage = _run(rng, sizes.passage, split)
        rare = [w for w in dict.fromkeys(passage) if ranks()[w] >= COMMON]
        if len(rare) >= sizes.query:
            chosen = set(rng.sample(rare, sizes.query))
            return passage, tuple(w for w in rare if w in chosen)


def _run(rng: random.Random, count: int, split: str) -> list[str]:
    """Words that follow each other in the split's plays."""
    words = corpus()
    edge = round(TRAINED * len(words))
    low, high = (0, edge) if split == "train" else (edge, len(words))
    start = rng.randrange(low, high - count)
    return list(words[start : start + count])


def _strewn(rng: random.Random, words: list[str], query: Words) -> list[str]:
    """The words, of which as many as the query has are now the query's."""
    for place, word in zip(rng.sample(range(len(words)), len(query)), query, strict=True):
        words[place] = word
    return words
