"""Spotlight on SmolLM2: how often an instruction about the answer's form is followed, with and without.

    python benchmarks/spotlight.py [--seeds 0 1 2] [--shares 0.3] [--over row layer]

Every question is asked twice a seed: to be answered in capitals, and to be ended with a given word. The
seed draws how the instruction is put, the word, and whether it stands before or behind the question.
Answers are greedy, of at most 24 tokens; prompts and samples are the same in every condition.
`--tuning` asks other questions: shares are chosen on those.
"""

from __future__ import annotations

import argparse
import random
import re
from contextlib import nullcontext
from dataclasses import dataclass

import torch

import attlas
from attlas.attach import attach, find_span
from attlas.models.load import load_tokenizer
from attlas.parts.steer.spotlight import Spotlight
from attlas.tasks.record import share
from common import save, show

NEW_TOKENS = 24
BATCH = 40
CAPITALS = (
    "Answer in capital letters only.",
    "Write your whole answer in capital letters.",
    "USE ONLY CAPITAL LETTERS IN YOUR ANSWER.",
    "Your answer must be in uppercase letters.",
)
ENDINGS = (
    'End your answer with the word "{}".',
    'The last word of your answer must be "{}".',
    'Finish your answer with the word "{}".',
    'Your answer must end with "{}".',
)
WORDS = (
    "banana", "thanks", "river", "orange", "hello", "music", "garden", "window", "tiger", "coffee",
    "goodbye", "apple",
)  # fmt: skip
TOPICS = (
    "the sun", "bees", "rivers", "sleep", "bread", "winter", "books", "horses", "the moon", "trees",
    "rain", "cats", "salt", "trains", "milk", "mountains", "music", "fish", "gold", "dreams",
    "wheels", "clouds", "paper", "birds", "fire", "glass", "honey", "ships", "wool", "the wind",
    "clocks", "ice", "sand", "maps", "roses", "iron", "tea", "bridges", "stars", "rice",
)  # fmt: skip
TUNING = (
    "dogs", "the sea", "cheese", "summer", "pens", "cows", "snow", "flowers", "pepper", "cars",
    "juice", "valleys", "songs", "whales", "silver", "kites",
)  # fmt: skip
QUESTIONS = ("Say something about {}.", "What do you know about {}?", "Tell me one fact about {}.")


@dataclass
class Sample:
    """A prompt, the instruction in it, and the word that the answer is to end with, if any."""

    prompt: str
    instruction: str
    word: str | None


def samples(topics: tuple[str, ...], seed: int) -> list[Sample]:
    """Two for each topic."""
    rng, found = random.Random(seed), []
    for topic in topics:
        for word in (None, rng.choice(WORDS)):
            instruction = rng.choice(CAPITALS) if word is None else rng.choice(ENDINGS).format(word)
            pieces = [rng.choice(QUESTIONS).format(topic), instruction]
            rng.shuffle(pieces)
            found.append(Sample(" ".join(pieces), instruction, word))
    return found


def followed(sample: Sample, answer: str) -> bool:
    """Whether all letters are capitals, or the last word is the one asked for.

    An answer that repeats three words of the instruction in a row follows nothing.
    """
    told, said = re.findall(r"\w+", sample.instruction.lower()), re.findall(r"\w+", answer.lower())
    runs = {tuple(told[n : n + 3]) for n in range(len(told) - 2)}
    if any(tuple(said[n : n + 3]) in runs for n in range(len(said) - 2)):
        return False
    if sample.word is None:
        return any(c.isalpha() for c in answer) and answer == answer.upper()
    return bool(said) and said[-1] == sample.word


def answers(model, tokenizer, asked: list[Sample], options: dict | None) -> list[str]:
    """Greedy answers, with the instructions of all rows steered unless `options` is None."""
    said = []
    for start in range(0, len(asked), BATCH):
        some = asked[start : start + BATCH]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": s.prompt}], tokenize=False, add_generation_prompt=True
            )
            for s in some
        ]
        spans = [
            [find_span(tokenizer, tokenizer(text)["input_ids"], s.instruction)]
            for text, s in zip(texts, some, strict=True)
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        steered = nullcontext() if options is None else attach(model, Spotlight(spans, **options))
        with torch.no_grad(), steered:
            out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        said += tokenizer.batch_decode(new, skip_special_tokens=True)
    return said


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3])
    parser.add_argument("--over", nargs="+", default=["row", "layer"], choices=["row", "layer"])
    parser.add_argument("--tuning", action="store_true")
    parser.add_argument("--print", action="store_true", dest="told")
    given = parser.parse_args()
    model, tokenizer = attlas.load("smollm2"), load_tokenizer("smollm2")
    topics = TUNING if given.tuning else TOPICS
    conditions: list[dict | None] = [None]
    conditions += [{"share": s, "over": over} for over in given.over for s in given.shares]
    rows = []
    for options in conditions:
        for seed in given.seeds:
            asked = samples(topics, seed)
            said = answers(model, tokenizer, asked, options)
            hits = [followed(s, answer) for s, answer in zip(asked, said, strict=True)]
            for kind in ("capitals", "ending"):
                capitals = kind == "capitals"
                some = [
                    hit for hit, s in zip(hits, asked, strict=True) if (s.word is None) == capitals
                ]
                found = share(sum(some), len(some))
                rows.append(
                    show(
                        {
                            **(options or {"share": 0.0, "over": "alone"}), "kind": kind,
                            "seed": seed, "hits": sum(some), "n": found.n, "followed": found.value,
                            "low": found.low, "high": found.high,
                        }
                    )
                )  # fmt: skip
            if given.told:
                for s, answer, hit in zip(asked, said, hits, strict=True):
                    print("   ", hit, repr(s.prompt), "->", repr(answer), flush=True)
        if not given.tuning:  # after each condition: a run that is cut off keeps what it has
            save("spotlight", "cpu", rows)


if __name__ == "__main__":
    main()
