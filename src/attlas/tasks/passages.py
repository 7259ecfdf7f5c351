"""Passages to rank: a query of words from and around one passage of the plays, among others that match.

    relevant    a run of words of the plays
    query       `own` rare words of it and `near` rare words of the lines around it, in random order
    others      passages that hold one of the query's words, drawn from all that do

Words around the relevant passage are not in it, so that what matches by letters alone cannot tell it from
the others well; what belongs together does. Training and test draw from different plays. All follows
from the seed.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from attlas.errors import UserError
from attlas.tasks.retrieval import COMMON, TRAINED, Candidates, Words, corpus, ranks

#: Words before and behind a passage that its query may be drawn from.
AROUND = 12
#: BM25: how soon a word's repetitions are enough. All passages are of one length, which drops out.
SATURATION = 1.2


class Sizes(NamedTuple):
    """How long passages are and what queries are made of, in words."""

    passage: int = 16
    own: int = 1
    near: int = 3


@dataclass(frozen=True)
class Index:
    """All passages of a split.

    Attributes:
        passages: in the order of the plays.
        holding: the numbers of the passages that hold each word.
    """

    passages: tuple[Words, ...]
    holding: dict[str, tuple[int, ...]]

    def bm25(self, query: Words, passage: Words) -> float:
        """How well the words of a query and of a passage match."""
        counts, found = Counter(passage), 0.0
        for word in query:
            held = len(self.holding.get(word, ()))
            rarity = math.log(1 + (len(self.passages) - held + 0.5) / (held + 0.5))
            found += rarity * counts[word] * (SATURATION + 1) / (counts[word] + SATURATION)
        return found


@cache
def index(split: str, words: int) -> Index:
    """The passages of a split's plays, `words` long each."""
    edge = round(TRAINED * len(corpus()))
    text = corpus()[:edge] if split == "train" else corpus()[edge:]
    passages = tuple(text[i : i + words] for i in range(0, len(text) - words, words))
    holding: defaultdict[str, list[int]] = defaultdict(list)
    for number, passage in enumerate(passages):
        for word in dict.fromkeys(passage):
            holding[word].append(number)
    return Index(passages, {word: tuple(numbers) for word, numbers in holding.items()})


def draw(rng: random.Random, sizes: Sizes, split: str, count: int) -> tuple[Candidates, int]:
    """(a query with `count` passages, which of them is relevant).

    Raises:
        ValueError: a passage too short for its query's words.
    """
    if sizes.own + sizes.near <= 0 or sizes.own > sizes.passage // 2 or sizes.near > AROUND:
        raise UserError(
            f"own and near take some of a passage's {sizes.passage} words, at most half, and of the "
            f"{2 * AROUND} around it, at most half; got {sizes.own} and {sizes.near}"
        )
    known = index(split, sizes.passage)
    while True:
        at = rng.randrange(1, len(known.passages) - 1)
        own = rare(known.passages[at])
        around = known.passages[at - 1][-AROUND:] + known.passages[at + 1][:AROUND]
        near = tuple(word for word in rare(around) if word not in known.passages[at])
        if len(own) < sizes.own or len(near) < sizes.near:
            continue
        query = [*rng.sample(own, sizes.own), *rng.sample(near, sizes.near)]
        rng.shuffle(query)
        pool = {i for word in query for i in known.holding[word] if abs(i - at) > 1}
        if len(pool) >= count - 1:
            break
    others = [known.passages[i] for i in rng.sample(sorted(pool), count - 1)]
    relevant = rng.randrange(count)
    others.insert(relevant, known.passages[at])
    return Candidates(tuple(query), tuple(others)), relevant


def rare(words: Words) -> Words:
    """Those that are none of the most frequent ones, each once."""
    return tuple(word for word in dict.fromkeys(words) if ranks()[word] >= COMMON)


def reciprocal_rank(scores: list[float], relevant: int) -> float:
    """1 / rank of the relevant one; of equal ones it stands in the middle."""
    own = scores[relevant]
    above = sum(score > own for score in scores)
    equal = sum(score == own for score in scores) - 1
    return 1 / (1 + above + equal / 2)
