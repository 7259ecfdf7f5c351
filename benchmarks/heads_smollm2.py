"""What heads of SmolLM2 do: they answer multiple choice, retrieve needles, and judge relevance.

    python benchmarks/heads_smollm2.py choice [--prompts 200] [--seeds 0 1 2]
    python benchmarks/heads_smollm2.py retrieval [--length 128] [--depths 12] [--seeds 0]
    python benchmarks/heads_smollm2.py relevance [--prompts 100] [--seeds 0 1 2]

choice: heads that are chosen on half of the prompts (attlas.inspect.tasks, stated-choice) against the
letters' logits, on the other half. retrieval: scores at evenly spaced depths, and needles found on new
prompts with the ten best heads masked, or ten others. relevance: right judgements without any training.
"""

from __future__ import annotations

import argparse

import torch

import attlas
from attlas.analyses.relevance_patching import judgements
from attlas.analyses.retrieval_heads import RETRIEVES, RetrievalHeads
from attlas.analyses.select_and_copy_heads import SelectAndCopyHeads
from attlas.inspect.runs import accuracy
from attlas.inspect.subject import Subject
from attlas.inspect.tasks import draw
from attlas.models.load import load_tokenizer
from common import save, show


def choice(model, tokenizer, seed: int, given: argparse.Namespace):
    """Answers of chosen heads and of the letters."""
    prompts = draw("stated-choice", tokenizer, given.prompts, seed)
    found = SelectAndCopyHeads().look(Subject(model, prompts=prompts, tokenizer=tokenizer, seed=seed))
    for by, head, first, right in found.tables[0].rows:
        yield {"chosen by": by, "head": head, "on the first half": first, "right": right}


def retrieval(model, tokenizer, seed: int, given: argparse.Namespace):
    """How many heads retrieve, and what masking the best costs."""
    analysis = RetrievalHeads(lengths=(given.length,), depths=given.depths, masked_heads=10)
    found = analysis.look(Subject(model, tokenizer=tokenizer, seed=seed))
    scores = found.heads["retrieval"]
    yield {
        "says": found.says, "above": int((scores.values > RETRIEVES).sum()), "of": scores.values.numel(),
        "best": [[x, h, float(scores.values[x, h])] for x, h in scores.top(10)],
    }  # fmt: skip
    for what, heads, right in found.tables[0].rows:
        yield {"masked": what, "heads": heads, "found": right}


def relevance(model, tokenizer, seed: int, given: argparse.Namespace):
    """Right judgements; half are right by chance."""
    for way in ("pointwise", "pairwise"):
        prompts = judgements(tokenizer, given.prompts, way, seed)
        hits = [accuracy(model, prompts[n : n + 20]) for n in range(0, given.prompts, 20)]
        yield {"way": way, "pairs": given.prompts, "right": float(torch.tensor(hits).mean())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["choice", "retrieval", "relevance"])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--depths", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    model, tokenizer = attlas.load("smollm2"), load_tokenizer("smollm2")
    looks = {"choice": choice, "retrieval": retrieval, "relevance": relevance}
    rows = []
    for seed in given.seeds:
        for row in looks[given.what](model, tokenizer, seed, given):
            rows.append(show({"seed": seed, **row}))
    save(f"heads-smollm2-{given.what}", "cpu", rows)


if __name__ == "__main__":
    main()
