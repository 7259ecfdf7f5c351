"""Haystacks of keys and values with threads through them, how they are asked, and a solver.

The answers come from the plan by which a haystack was made; the solver knows only its text.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attlas.errors import UserError
from attlas.kinds.system import Example
from attlas.tasks.chat import tokens

TASKS = (
    "needle", "needles", "conditional", "thread-forward", "thread-backward", "thread-random",
    "threads", "branching",
)  # fmt: skip
SEVERAL, BRANCHES, MARK = 4, 2, "*"
TOLERANCE = 0.01
#: A pair of text: its key, and its value or the keys that it offers.
Pair = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a haystack: a task, and the keys that are given."""

    task: str
    haystack: str
    keys: tuple[str, ...]


@dataclass
class _Line:
    """Pairs whose order is kept, the key from which they are followed, and the value at the end."""

    start: str
    end: str
    pairs: list[Pair]


def haystack(
    task: str, length: int, rng: random.Random, asks: int, size: int, steps: int,
    count: Callable[[str], int],
) -> list[Example]:
    """Questions to one haystack whose `count` is `length`, at most 1 % less.

    Raises:
        UserError: the length is too short for what is asked, or the size for so many names.
    """
    names = _names(rng, size)
    lines: list[_Line] = []
    if task == "conditional":
        lines = [_marked(names, rng) for _ in range(SEVERAL)]
    elif task not in ("needle", "needles"):
        lines = [_thread(names, rng, steps, task)]
        # Threads take half of the text at most.
        most = length // (2 * count(text_of(lines[0].pairs)))
        threads = max(SEVERAL if task == "threads" else 1, min(asks, most))
        lines += [_thread(names, rng, steps, task) for _ in range(threads - 1)]
    planted = [pair for line in lines for pair in line.pairs]
    fillers = [_Line("", "", [(next(names), next(names))])]
    while count(text_of(planted + [f.pairs[0] for f in fillers])) <= length:
        more = 1 + len(fillers) // 4
        fillers += [_Line("", "", [(next(names), next(names))]) for _ in range(more)]
    while len(fillers) > 1 and count(text_of(planted + [f.pairs[0] for f in fillers])) > length:
        fillers.pop()
    places = list(range(len(planted) + len(fillers)))
    rng.shuffle(places)
    pairs: list[Pair] = [("", "")] * len(places)
    for line in [*lines, *fillers]:  # each in the order of its pairs, at random places
        for place in sorted(places.pop() for _ in line.pairs):
            pairs[place] = line.pairs.pop(0)
    # The pair that is stretched to fill the length is asked for by nobody.
    loose = next(k for k, pair in enumerate(pairs) if pair not in planted)
    spare, value = pairs[loose]
    while (gap := length - count(text_of(pairs))) > 0:
        value = str(value) + "".join(rng.choices("0123456789", k=max(1, gap // 2)))
        pairs[loose] = (spare, value)
    while (gap := length - count(text_of(pairs))) < 0 and len(value) > 1:
        value = value[:-1]
        pairs[loose] = (spare, value)
    if not 0 <= gap <= TOLERANCE * length or len(pairs) < 2 * SEVERAL:
        raise UserError(
            f"length {length} is too short for a haystack of {task} with {len(planted)} planted pairs; "
            "give a longer one, or less asks or steps"
        )
    text, known = text_of(pairs), {str(k): str(v) for k, v in pairs if k != spare}
    ends = {line.start: line.end for line in lines}
    if task == "conditional":
        return [Example(Question(task, text, ()), frozenset(ends.values()))]
    if not lines:
        ends = known
    wanted = SEVERAL if task in ("needles", "threads") else 1
    asked = [rng.sample(sorted(ends), wanted) for _ in range(asks)]
    if lines and wanted == 1:
        asked = [[start] for start in ends]
    return [Example(Question(task, text, tuple(k)), tuple(ends[x] for x in k)) for k in asked]


def _names(rng: random.Random, size: int) -> Iterator[str]:
    """Different names without end."""
    seen: set[str] = set()
    whole = size >= 32
    while whole or len(seen) < 10**size:
        name = str(uuid.UUID(int=rng.getrandbits(128)))
        if not whole:
            name = f"{rng.randrange(10**size):0{size}d}"
        if name not in seen:
            seen.add(name)
            yield name
    raise UserError(f"size {size} gives {10**size} names, too few for this length; give a larger size")


def _marked(names: Iterator[str], rng: random.Random) -> _Line:
    """A pair whose key holds the mark."""
    key, value = next(names), next(names)
    place = rng.randrange(len(key) + 1)
    key = key[:place] + MARK + key[place:]
    return _Line(key, value, [(key, value)])


def _thread(names: Iterator[str], rng: random.Random, steps: int, task: str) -> _Line:
    """A thread in the order in which its pairs shall stand."""
    keys, end = [next(names) for _ in range(steps)], next(names)
    pairs: list[Pair] = list(zip(keys, [*keys[1:], end], strict=True))
    if task == "branching":  # all but the last two steps offer a key whose thread ends at once
        for k in range(steps - 2):
            dead = [next(names) for _ in range(BRANCHES - 1)]
            offered = [keys[k + 1], *dead]
            rng.shuffle(offered)
            pairs[k] = (keys[k], offered)
            pairs += [(key, next(names)) for key in dead]
        rng.shuffle(pairs)
    elif task == "thread-backward":
        pairs.reverse()
    elif task == "thread-random":
        rng.shuffle(pairs)
    return _Line(keys[0], end, pairs)


def text_of(pairs: Sequence[Pair]) -> str:
    """The JSON object, a pair a line."""
    return "{" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs) + "}"


def values(known: Mapping[str, Any]) -> list[str]:
    """All plain values of a haystack."""
    return [value for value in known.values() if isinstance(value, str)]


def solve(question: Question) -> tuple[str, ...]:
    """The answer, by looking it up: all that the question holds is its text and its keys."""
    known: dict[str, Any] = json.loads(question.haystack)
    if question.task == "conditional":
        return tuple(value for key, value in known.items() if MARK in key)
    if question.task in ("needle", "needles"):
        return tuple(known[key] for key in question.keys)

    def longest(key: str) -> tuple[int, str]:
        value = known[key]
        ways = value if isinstance(value, list) else [value]
        ends = [longest(way) if way in known else (0, way) for way in ways]
        depth, end = max(ends, key=lambda found: found[0])
        return depth + 1, end

    return tuple(longest(key)[1] for key in question.keys)


def effective(scores: Mapping[int, float], threshold: float) -> int:
    """The longest length up to which every score is at least the threshold; 0 where there is none."""
    found = 0
    for length in sorted(scores):
        if scores[length] < threshold:
            break
        found = length
    return found


def accounting(tokenizer: Any, text: str) -> dict[str, float]:
    """Characters and tokens of a text, and characters a token: abstract text costs more than prose."""
    count = len(tokens(tokenizer, text))
    return {"characters": len(text), "tokens": count, "characters_per_token": len(text) / count}
