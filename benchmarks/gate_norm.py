"""Gate-Norm on SmolLM2: time to score, and the loss without the layers it chooses against random ones.

    python benchmarks/gate_norm.py [--layers 3] [--tokens 4096]

Losses are means over the same pieces of held-out Shakespeare; `±` is the 95 % interval of the mean of
the differences to the model as it is, over the pieces.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

import attlas
from attlas.adapt.gate_norm import GateNorm
from attlas.adapting.texts import held_out
from attlas.models.load import load_tokenizer
from attlas.tasks.compare.perplexity import surprise

RANDOM = 5
LENGTH = 256


class Chosen(GateNorm):
    """Removes given layers, to compare with."""

    def __init__(self, removed: list[int]) -> None:
        super().__init__(layers=len(removed))
        self.saved = {"removed": torch.tensor(removed)}


def lowest(scores, count: int) -> list[int]:
    return sorted(scores.argsort(stable=True)[:count].tolist())


def losses(model, pieces) -> list[float]:
    """Mean loss of each piece."""
    with torch.no_grad():
        return [
            surprise(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:]).mean().item()
            for ids in pieces
        ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    given = parser.parse_args()
    model = attlas.load("smollm2")
    pieces = held_out(load_tokenizer("smollm2"), given.tokens, LENGTH)
    adapter = GateNorm(layers=given.layers)
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        scores = adapter.scores(model)
        spent.append(time.perf_counter() - start)
    print(f"scoring {len(scores)} layers: {statistics.median(spent):.3f} s (median of 5)")
    print("scores:", " ".join(f"{score:.1f}" for score in scores.tolist()))
    folded = GateNorm(layers=given.layers, gains=True).scores(model)
    rng = random.Random(0)
    choices = {"by score": lowest(scores, given.layers), "with gains": lowest(folded, given.layers)}
    for number in range(RANDOM):
        choices[f"random {number}"] = sorted(rng.sample(range(len(scores)), given.layers))
    plain = losses(model, pieces)
    print(f"{'model':10} {'':14} {statistics.fmean(plain):.3f} nats", flush=True)
    means = {}
    for name, removed in choices.items():
        with Chosen(removed).inject(model):
            found = losses(model, pieces)
        more = [a - b for a, b in zip(found, plain, strict=True)]
        around = 1.96 * statistics.stdev(more) / len(more) ** 0.5
        means[name] = statistics.fmean(found)
        told = f"{means[name]:.3f} nats, +{statistics.fmean(more):.3f} ± {around:.3f}"
        print(f"{name:10} {removed!s:14} {told}", flush=True)
    mean = statistics.fmean(means[name] for name in means if name.startswith("random"))
    print(f"mean of random choices {mean:.3f}, by score {means['by score']:.3f} nats")


if __name__ == "__main__":
    main()
