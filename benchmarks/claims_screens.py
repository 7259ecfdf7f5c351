"""GUI-KV on several screens in words, read by the real language model: gui-kv.json.

    python benchmarks/claims_screens.py [--out FOLDER] [--device cuda] [--texts 34] [--seeds 3]
        [--keep 0.2] [--shown 5]

    Screen 3
    row Save shows 481        stands on every screen
    row Photos shows 205      shown on this one alone
    row Level shows 366       stands on every screen, changed by this step
    ...

One number is asked for: one that stands on all screens, one that the last screen changed, one that it
alone shows, or one that an earlier screen alone showed; with the question in the prompt, or after the
cache has been cut. A screen is the span of tokens that an image would be. What this cannot show: states
of a vision encoder, whose norms the spatial score was made for, and steps of a real agent.

Each seed asks `--texts` texts of each kind. The record is written anew after every seed.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attlas
from attlas import prefill
from attlas.attach import attach
from attlas.cache.part import CachePart
from attlas.compare.machine import machine
from attlas.hf.caches import with_cache
from attlas.kinds.expect import Beats, Expectation, Row, verdict
from attlas.models.load import load_tokenizer
from attlas.study.record import packed, save
from attlas.tasks.chat import template, tokens

#: Each one token of SmolLM2's behind a space, so that all texts have the same spans.
NAMES = (
    "Save Open Close Search Profile Home Back Next Volume Price Score Page Level Total Count Order "
    "Speed Height Size Weight Budget Limit Stock Room Table Code Number Account Channel Station Camera "
    "Battery Light Signal Temperature Pressure Distance Amount Balance Credit Rate Time Date Year Month "
    "Rating Version Section Unit Block Floor Gate Route Track Line Memory Storage Cache Port Queue "
    "Photos Music Video Mail News Maps Weather Health Sports Games Books"
)
OPENING = "These are the screens of an app, one after each step. Remember their numbers.\n"
SCREEN = "\nScreen {step}\n"
ROW = "row {name} shows {number}\n"
QUESTION = "\nWhat number does {name} show?"
REPLY = "The number that {name} shows is"
KINDS = ("standing", "changed", "last alone", "earlier alone")
ANSWER, WINDOW = 5, 8


@dataclass(frozen=True)
class Screens:
    """A text of screens: its tokens, their spans, and what is asked of each kind."""

    context: list[int]
    spans: tuple[tuple[int, int], ...]
    once: list[int]  # tokens of rows that one earlier screen alone shows
    again: list[int]  # tokens of rows of earlier screens that stand on the last one
    questions: Mapping[str, list[int]]
    numbers: Mapping[str, str]


def screens(tokenizer: Any, seed: str, shown: int = 5, standing: int = 20, own: int = 2) -> Screens:
    """Screens of an app whose rows stay, but for one changed and `own` new ones each step."""
    rng = random.Random(seed)
    names = rng.sample(NAMES.split(), standing + shown * own)
    rest = names[:standing]
    numbers = {
        name: str(number) for name, number in zip(names, _numbers(rng, len(names)), strict=True)
    }
    frame = template(tokenizer)
    ids, spans, once, again = tokens(tokenizer, frame.opening + OPENING), [], [], []
    changed = rng.sample(rest, shown)
    for step in range(shown):
        if step:
            numbers[changed[step]] = _new(rng, numbers)
        ids += tokens(tokenizer, SCREEN.format(step=step + 1))
        start, alone = len(ids), names[standing + step * own :][:own]
        rows = [*rest, *alone]
        random.Random(f"{seed} {step}").shuffle(alone)
        for place, name in zip(rng.sample(range(standing), own), alone, strict=True):
            rows.remove(name)
            rows.insert(place, name)
        for name in rows:
            piece = tokens(tokenizer, ROW.format(name=name, number=numbers[name]))
            if step < shown - 1:
                (once if name in alone else again).extend(range(len(ids), len(ids) + len(piece)))
            ids += piece
        spans.append((start, len(ids)))
    asked = {
        "standing": rng.choice([name for name in rest if name not in changed]),
        "changed": changed[-1],
        "last alone": names[-1],
        "earlier alone": names[standing + rng.randrange((shown - 1) * own)],
    }
    questions = {
        kind: tokens(
            tokenizer, QUESTION.format(name=name) + frame.closing + REPLY.format(name=name)
        )
        for kind, name in asked.items()
    }
    return Screens(
        ids, tuple(spans), once, again, questions, {kind: numbers[n] for kind, n in asked.items()}
    )


def _numbers(rng: random.Random, count: int) -> list[int]:
    return rng.sample(range(100, 1000), count)


def _new(rng: random.Random, numbers: Mapping[str, str]) -> str:
    return str(rng.choice([n for n in range(100, 1000) if str(n) not in numbers.values()]))


def parts_of(spans: tuple[tuple[int, int], ...], keep: float) -> dict[str, CachePart | None]:
    """Window attention alone, with both terms, and with each of them."""
    make = attlas.make
    return {
        "full": None,
        "snapkv": make("snapkv", keep=keep, window=WINDOW),
        "gui-kv": make("gui-kv", keep=keep, window=WINDOW, images=spans),
        "spatial alone": make("gui-kv", keep=keep, window=WINDOW, images=spans[-1:]),
        "temporal alone": make("gui-kv", keep=keep, window=WINDOW, images=spans, alpha=0.0),
    }


@torch.no_grad()
def rows_of(
    model: Any, tokenizer: Any, texts: int, shown: int, keep: float, seed: int
) -> Iterator[Row]:
    """Share of the numbers said rightly, by kind and in all, and of what is kept of earlier screens."""
    made = [screens(tokenizer, f"screens {seed} {i}", shown) for i in range(texts)]
    parts = parts_of(made[0].spans, keep)
    read, device = [part for part in parts.values() if part], model.device
    context = torch.tensor([text.context for text in made], device=device)
    later = prefill(model, context, read)
    right, kept = defaultdict(list), defaultdict(list)
    for kind in KINDS:
        questions = torch.tensor([text.questions[kind] for text in made], device=device)
        asked = prefill(model, torch.cat([context, questions], 1), read)
        for name, part in parts.items():
            for when, prompt, first in (("asked", asked, None), ("later", later, questions)):
                cache = prompt.fork(part)
                if part is not None and kind == KINDS[0]:
                    kept[f"{name}, {when}"] = _kept(cache, made)
                said = _said(model, cache, part, prompt.logits, first)
                for text, ids in zip(made, said.tolist(), strict=True):
                    found = tokenizer.decode(ids).strip()[:3] == text.numbers[kind]
                    right[f"{name}, {when}, {kind}"].append(found)
                    right[f"{name}, {when}"].append(found)
    for label, found in right.items():
        yield Row(label, 100 * sum(found) / len(found), "%", "higher")
    for label, (once, again) in kept.items():
        yield Row(f"{label}: kept of rows shown once", 100 * once, "%", "higher")
        yield Row(f"{label}: kept of rows shown again", 100 * again, "%", "lower")


def _said(
    model: Any, cache: Any, part: CachePart | None, logits: Tensor, first: Tensor | None
) -> Tensor:
    """The greedy answer, after `first` has been read if there is any."""
    found = []
    with attach(model, *([part] if part else [])):
        if first is not None:
            logits = model(first, **with_cache(model, cache)).logits[:, -1]
        for _ in range(ANSWER):
            found.append(logits.argmax(-1, keepdim=True))
            logits = model(found[-1], **with_cache(model, cache)).logits[:, -1]
    return torch.cat(found, 1)


def _kept(cache: Any, made: list[Screens]) -> tuple[float, float]:
    """Shares of the tokens of earlier screens that are kept, shown once and shown again."""
    shares = []
    for places in ([text.once for text in made], [text.again for text in made]):
        wanted = torch.tensor(places)[:, None, :]
        found = []
        for layer in cache.layers:
            at = layer.original_positions().cpu()
            held = torch.zeros(*at.shape[:2], len(made[0].context) + 256, dtype=torch.bool)
            held.scatter_(2, at.clamp(min=0), at >= 0)
            found.append(held.gather(2, wanted.expand(-1, at.shape[1], -1)).float().mean())
        shares.append(float(torch.stack(found).mean()))
    return shares[0], shares[1]


def claimed(name: str) -> tuple[str, tuple[Expectation, ...]]:
    """What is claimed of `gui-kv`, and when it holds."""
    beats = (Beats(f"{name}, {when}", f"snapkv, {when}") for when in ("asked", "later"))
    return (
        "of several screens it keeps what is asked for better than window attention alone does",
        tuple(beats),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "claims")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", type=float, default=0.2)
    for name, value in (("texts", 34), ("seeds", 3), ("shown", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    model, tokenizer = attlas.load("smollm2").to(given.device, dtype), load_tokenizer("smollm2")
    given.out.mkdir(parents=True, exist_ok=True)
    claim, expects = claimed("gui-kv")
    rows: list[Row] = []
    for seed in range(given.seeds):
        rows += rows_of(model, tokenizer, given.texts, given.shown, given.keep, seed)
        numbers = defaultdict(list)
        for row in rows:
            numbers[row.name].append(row.value)
        made = packed(
            "gui-kv", claim,
            f"SmolLM2-135M, {given.shown} screens in words, {given.texts} texts a seed and kind "
            f"of question, {given.keep:g} of the cache, window {WINDOW}, {str(dtype)[6:]}",
            f"python benchmarks/claims_screens.py --texts {given.texts} --keep {given.keep:g} "
            f"--shown {given.shown}",
            numbers, verdict([one.answer(rows) for one in expects]),
            {row.name: (row.unit, row.better) for row in rows},
            machine=machine(torch.device(given.device)),
        )  # fmt: skip
        save(made, given.out / "gui-kv.json")
        print(f"seed {seed}: {made['verdict']}", flush=True)
    for label, values in numbers.items():
        print(f"  {label}: {sum(values) / len(values):.4g}", flush=True)


if __name__ == "__main__":
    main()
