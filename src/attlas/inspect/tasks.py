"""Tasks with known circuits, as pairs of prompts: each draws as many as asked from a seed.

    indirect-objects   When Mary and John went to the store, John gave a book to      → Mary
    induction          random tokens, and again from the start                        → what came next
    colours            … a red cup, a blue hat … What color is the hat? A: The hat is → blue
    greater-than       The war lasted from the year 1742 to the year 17               → 5, not 2
    multiple-choice    … A. chair B. apple C. river D. lamp Answer:                   → B

The corrupted twin has the same length and another answer: the other name is named twice, the earlier
token is followed by another one, the other thing is asked about, the year begins with 0, two options
have changed places.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attlas.errors import UnknownName, UserError
from attlas.inspect.prompts import Pair, Prompts, one_token, spelled

NAMES = (
    "Mary", "John", "Tom", "Anna", "James", "Sarah", "David", "Emma", "Paul", "Lucy", "Peter", "Alice",
    "Mark", "Jane", "Robert", "Laura", "Michael", "Susan", "George", "Rachel",
)  # fmt: skip
PLACES = ("store", "park", "school", "office", "garden", "station", "hospital", "market")
THINGS = ("book", "ring", "drink", "letter", "ball", "bag", "box", "gift")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "purple", "pink", "gray")
OBJECTS = ("cup", "hat", "book", "ball", "pen", "bag", "box", "chair", "shirt", "lamp")
EVENTS = ("war", "trip", "study", "project", "trial", "drought", "siege", "reign")
KINDS = {
    "fruit": ("apple", "banana", "orange", "grape", "lemon"),
    "animal": ("dog", "cat", "horse", "cow", "bird"),
    "color": ("red", "blue", "green", "yellow", "purple"),
    "vehicle": ("car", "train", "bus", "boat", "truck"),
    "tool": ("hammer", "saw", "knife", "shovel", "drill"),
    "metal": ("iron", "gold", "silver", "copper", "steel"),
}
LETTERS = ("A", "B", "C", "D")


def draw(name: str, tokenizer: Any, count: int = 32, seed: int = 0, length: int = 20) -> Prompts:
    """Pairs of prompts of a task.

    Args:
        name: of the task, one of `TASKS`.
        tokenizer: whose words they are made of.
        count: how many.
        seed: of what is drawn.
        length: tokens before they repeat, of induction.

    Raises:
        ValueError: an unknown task, a count below 1, or words that the tokenizer does not spell in one
            token each.
    """
    if name not in TASKS:
        raise UnknownName("task", name, list(TASKS))
    if count < 1:
        raise UserError(f"count must be at least 1, got {count}")
    if name == "induction":
        return induction(tokenizer, count, seed, length)
    rng = random.Random(seed)
    pairs = [TASKS[name](tokenizer, rng) for _ in range(count)]
    return spelled(pairs, tokenizer, name)


def indirect_objects(tokenizer: Any, rng: random.Random) -> Pair:
    """Two people; the one who is named once is given the thing."""
    a, b = rng.sample(whole(NAMES, tokenizer, 4, "names"), 2)
    place, thing = (rng.choice(whole(words, tokenizer, 1, "words")) for words in (PLACES, THINGS))
    first, second = rng.sample((a, b), 2)
    text = f"When {first} and {second} went to the {place}, {{}} gave a {thing} to"
    return Pair(text.format(b), text.format(a), f" {a}", f" {b}")


def colours(tokenizer: Any, rng: random.Random) -> Pair:
    """Three things of three colours, and a question about one of them."""
    things = rng.sample(whole(OBJECTS, tokenizer, 3, "objects"), 3)
    shades = rng.sample(whole(COLOURS, tokenizer, 3, "colours"), 3)
    seen = [f"a {shade} {thing}" for shade, thing in zip(shades, things, strict=True)]
    text = f"On the table I see {seen[0]}, {seen[1]} and {seen[2]}."
    ask = " Q: What color is the {0}? A: The {0} is"
    right, wrong = rng.sample(range(3), 2)
    prompts = [text + ask.format(things[at]) for at in (right, wrong)]
    return Pair(prompts[0], prompts[1], f" {shades[right]}", f" {shades[wrong]}")


def greater_than(tokenizer: Any, rng: random.Random) -> Pair:
    """A span of years that ends behind its beginning; the tens, where a tokenizer splits numbers."""
    event, century = rng.choice(whole(EVENTS, tokenizer, 1, "words")), rng.randint(11, 17)
    tens = rng.randint(2, 7)
    text = f"The {event} lasted from the year {century}{{}} to the year {century}"
    year, early = f"{tens}{rng.randint(1, 8)}", f"0{rng.randint(1, 8)}"
    right, wrong = str(rng.randint(tens + 1, 9)), str(rng.randint(0, tens - 1))
    if len(tokenizer(f"{century}{year}", add_special_tokens=False)["input_ids"]) < 4:
        right, wrong = f"{right}{rng.randint(0, 9)}", f"{wrong}{rng.randint(0, 9)}"
    return Pair(text.format(year), text.format(early), right, wrong)


def multiple_choice(tokenizer: Any, rng: random.Random) -> Pair:
    """Four options, one of the kind that is asked for."""
    kind, *others = rng.sample(sorted(KINDS), 4)
    options = [rng.choice(whole(KINDS[k], tokenizer, 1, f"words for {k}")) for k in (kind, *others)]
    right, wrong = rng.sample(range(4), 2)
    order = list(range(1, 4))
    order.insert(right, 0)
    swapped = list(order)
    swapped[right], swapped[wrong] = swapped[wrong], swapped[right]

    def asked(places: Sequence[int]) -> str:
        told = "\n".join(f"{LETTERS[at]}. {options[o]}" for at, o in enumerate(places))
        return f"Question: Which of these is a {kind}?\n{told}\nAnswer:"

    return Pair(asked(order), asked(swapped), f" {LETTERS[right]}", f" {LETTERS[wrong]}")


def induction(tokenizer: Any, count: int, seed: int, length: int) -> Prompts:
    """Random tokens, and again from the start: what followed the last one before follows again.

    Raises:
        ValueError: a length below 3, or a vocabulary without so many words.
    """
    if length < 3:
        raise UserError(f"length must be at least 3, got {length}")
    special = set(getattr(tokenizer, "all_special_ids", []))
    words = [n for n in range(len(tokenizer)) if n not in special]
    if len(words) < length + 1:
        raise UserError(
            f"the vocabulary has {len(words)} tokens, and {length + 1} different ones are drawn"
        )
    rng, at = random.Random(seed), length // 2
    clean, corrupted, answers = [], [], []
    for _ in range(count):
        *first, other = rng.sample(words, length + 1)
        changed = [*first[:at], other, *first[at + 1 :]]
        clean.append(first + first[:at])
        corrupted.append(changed + first[:at])
        answers.append([first[at], other])
    return Prompts(torch.tensor(clean), torch.tensor(corrupted), torch.tensor(answers), "induction")


def whole(words: Sequence[str], tokenizer: Any, least: int, what: str) -> list[str]:
    """Those of the words that the tokenizer spells in one token behind a space.

    Raises:
        ValueError: fewer than `least` of them.
    """
    found = []
    for word in words:
        try:
            one_token(f" {word}", tokenizer)
        except UserError:
            continue
        found.append(word)
    if len(found) < least:
        raise UserError(
            f"the tokenizer spells {len(found)} of {len(words)} {what} in one token, and this task needs "
            f"{least}, such as {words[0]!r}"
        )
    return found


#: Every task by name; a generator of one pair, or of all of them.
TASKS: dict[str, Callable[..., Any]] = {
    "indirect-objects": indirect_objects, "induction": induction, "colours": colours,
    "greater-than": greater_than, "multiple-choice": multiple_choice,
}  # fmt: skip
