"""On which tokens of arithmetic chains SmolLM2's FAI peaks, beside what chance would hit.

    python benchmarks/preplan_anchor.py [--chains 100] [--new 64]

The model goes on, greedily, with three worked sums and a fourth one's question; what it writes up to the
next question is a chain. A peak is a token whose signal is larger than both neighbours' and among the
largest two fifths of the chain. Of each chain the share of its peaks that hold a digit or an operator is
set against the share of all its tokens that do; chains without a peak do not count. The interval is of
95 % over the chains. δ is the step of WAAD from one token to the next.
"""

from __future__ import annotations

import argparse
import math
import random
import re

import torch

import attlas
from attlas.attach import attach
from attlas.models.load import load_tokenizer
from attlas.parts.record.preplan_anchor import PreplanAnchor
from common import save, show

NAMES = ("Ann", "Ben", "Cora", "Dan", "Eve", "Finn", "Gus", "Ida", "Leo", "Mia")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stones", "tickets")
TOP = 0.4


def sum_of(rng: random.Random) -> tuple[str, str]:
    """A question and its worked answer."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randrange(11, 60), rng.randrange(2, 30), rng.randrange(2, 10)
    question = f"Question: {name} has {a} {thing}, gets {b} more and gives {c} away. How many are left?\n"
    answer = (
        f"Answer: First we add what {name} gets: {a} + {b} = {a + b}. Then we subtract what {name} gives "
        f"away: {a + b} - {c} = {a + b - c}. So {name} has {a + b - c} {thing} left.\n"
    )
    return question, answer


def peaks(signal: torch.Tensor) -> list[int]:
    """Places above both neighbours and among the largest."""
    least = torch.quantile(signal, 1 - TOP)
    inner = signal[1:-1]
    there = (inner > signal[:-2]) & (inner > signal[2:]) & (inner >= least)
    return (there.nonzero().flatten() + 1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--new", type=int, default=64)
    given = parser.parse_args()
    model, tokenizer = attlas.load("smollm2"), load_tokenizer("smollm2")
    excess: dict[str, list[tuple[float, float]]] = {"fai": [], "delta": []}
    right = 0
    for seed in range(given.chains):
        rng = random.Random(seed)
        shown = [sum_of(rng) for _ in range(4)]
        text = "".join(q + a for q, a in shown[:3]) + shown[3][0]
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            whole = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=given.new,
            )
        new = [tokenizer.decode(token) for token in whole[0, ids.shape[1] :]]
        end = next((i for i in range(1, len(new)) if "\n" in new[i] or "Question" in new[i]), len(new))
        right += shown[3][1].split()[-3] in "".join(new[:end]).split()
        recorder = PreplanAnchor()
        with torch.no_grad(), attach(model, record=[recorder]):
            model(whole, logits_to_keep=1)  # what follows the chain looks back at it, too
        rhythm = recorder.rhythm(ids.shape[1])
        hit = [bool(re.search(r"[0-9+\-*/=×÷]", token)) for token in new[:end]]
        waad = rhythm.waad[0, : end + 1]
        for name, signal in (("fai", rhythm.fai[0, :end]), ("delta", waad.diff().abs()[:end])):
            at = [i for i in peaks(signal) if i < end] if len(signal) > 2 else []
            if at:
                excess[name].append((sum(hit[i] for i in at) / len(at), sum(hit) / len(hit)))
    rows = [show({"what": "chains", "n": given.chains, "right": right})]
    for name, pairs in excess.items():
        found = torch.tensor(pairs, dtype=torch.float64)
        more = found[:, 0] - found[:, 1]
        half = 1.96 * float(more.std()) / math.sqrt(len(more))
        rows.append(show({
            "signal": name, "chains": len(pairs), "peaks": float(found[:, 0].mean()),
            "chance": float(found[:, 1].mean()), "low": float(more.mean()) - half,
            "high": float(more.mean()) + half,
        }))  # fmt: skip
    save("preplan-anchor", "cpu", rows)


if __name__ == "__main__":
    main()
