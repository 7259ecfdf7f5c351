"""Massive values on SmolLM2: which heads have them, where they sit, and what disrupting them costs.

    python benchmarks/massive_values.py [--samples 120] [--dimensions 1 2 4] [--length 128]

Norms are those of passages of Shakespeare; dimensions i and i + dim/2 are rotated together, faster the
smaller i, and the slow third are the last pairs. A sample of the passkey task is a needle in a text of
`length` tokens (attlas.tasks.haystack), its depth drawn; prompts are the same in every condition.
"""

from __future__ import annotations

import argparse
import random
from contextlib import nullcontext

import torch

import attlas
from attlas.attach import attach
from attlas.models.load import load_tokenizer
from attlas.parts.record.massive_values import MassiveValues, MassiveValuesDisruption
from attlas.tasks.haystack import Haystack, correct, single
from attlas.tasks.record import share
from attlas.tasks.text import passage
from common import save, show

NEW_TOKENS = 8
BATCH = 40


def norms(model, tokenizer, passages: int, tokens: int) -> list[dict[str, object]]:
    """Shares of heads with a massive dimension, and of massive dimensions in the slow third."""
    heads: dict[str, list[bool]] = {name: [] for name in "qkv"}
    slow: dict[str, list[bool]] = {name: [] for name in "qk"}
    for seed in range(passages):
        text = passage(random.Random(seed), 8 * tokens)
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
        recorder = MassiveValues()
        with torch.no_grad(), attach(model, record=[recorder]):
            model(ids, logits_to_keep=1)
        massive = recorder.massive()
        for name, found in heads.items():
            found += massive[name].any(dim=-1).flatten().tolist()
        for name, found in slow.items():
            pairs = massive[name].shape[-1] // 2
            at = massive[name].nonzero()[:, -1] % pairs
            found += (at >= pairs - pairs // 3).tolist()
    rows = []
    for what, each in (("heads with one", heads), ("in the slow third", slow)):
        for name, yes in each.items():
            found = share(sum(yes), len(yes))
            rows.append(
                show(
                    {
                        "what": what, "of": name, "hits": sum(yes), "n": found.n,
                        "share": found.value, "low": found.low, "high": found.high,
                    }
                )
            )  # fmt: skip
    return rows


def prompts(tokenizer, samples: int, length: int) -> list[Haystack]:
    """Haystacks with a needle each."""
    rng = random.Random(0)
    return [single(tokenizer, length, rng.random(), f"massive {n}") for n in range(samples)]


def right(model, tokenizer, hidden: list[Haystack], options: dict | None) -> list[bool]:
    """Whether each number is said, with dimensions disrupted unless `options` is None."""
    found = []
    for start in range(0, len(hidden), BATCH):
        some = hidden[start : start + BATCH]
        rows = [{"input_ids": each.context + each.asked[0].question} for each in some]
        inputs = tokenizer.pad(rows, return_tensors="pt", padding_side="left")
        part = nullcontext()
        if options is not None:
            part = attach(model, MassiveValuesDisruption(**options))
        with torch.no_grad(), part:
            out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])
        found += [correct(each.asked[0], answer) for each, answer in zip(some, new, strict=True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--passages", type=int, default=8)
    given = parser.parse_args()
    model, tokenizer = attlas.load("smollm2"), load_tokenizer("smollm2")
    rows = norms(model, tokenizer, given.passages, tokens=256)
    hidden = prompts(tokenizer, given.samples, given.length)
    conditions: list[dict | None] = [None]
    for dimensions in given.dimensions:
        conditions += [
            {"dimensions": dimensions, "which": which} for which in ("largest", "smallest")
        ]
    for options in conditions:
        hits = sum(right(model, tokenizer, hidden, options))
        found = share(hits, len(hidden))
        rows.append(
            show(
                {
                    "what": "passkey", **(options or {"dimensions": 0, "which": "none"}),
                    "length": given.length, "hits": hits, "n": found.n, "share": found.value,
                    "low": found.low, "high": found.high,
                }
            )
        )  # fmt: skip
    save("massive-values", "cpu", rows)


if __name__ == "__main__":
    main()
