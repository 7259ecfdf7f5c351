"""Sinks of SmolLM2 over passages of Shakespeare: the first token's strength by layer, and secondary ones.

    python benchmarks/secondary_sinks.py [--passages 50] [--tokens 128]

The primary sink is a passage's first token; no begin token stands before it. Told of each layer are the
mean attention that it receives from all heads and the share of heads in which that exceeds 0.3; of
secondary sinks how many there are, where they are born and how long they live, and the rank correlation
of the norm that an MLP wrote with that.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import torch

import attlas
from attlas.attach import attach
from attlas.models.load import load_tokenizer
from attlas.parts.record.secondary_sinks import SecondarySink, SecondarySinks
from attlas.tasks.text import passage
from common import save, show

EPSILON = 0.3


def ranks(values: list[float]) -> torch.Tensor:
    """Ranks, those of equal numbers averaged."""
    x = torch.tensor(values, dtype=torch.float64)
    return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double() / 2


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; 0 where one does not vary."""
    pairs = torch.stack([ranks(a), ranks(b)])
    return float(torch.corrcoef(pairs)[0, 1].nan_to_num()) if len(a) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passages", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args()
    model, tokenizer = attlas.load("smollm2"), load_tokenizer("smollm2")
    first, words, found = [], Counter(), list[SecondarySink]()
    for seed in range(given.passages):
        text = passage(random.Random(seed), 8 * given.tokens)
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : given.tokens]
        recorder = SecondarySinks()
        with torch.no_grad(), attach(model, record=[recorder]):
            model(ids, logits_to_keep=1)
        first.append(recorder.received()[:, 0, :, 0])
        for sink in recorder.sinks():
            found.append(sink)
            words[tokenizer.decode(ids[0, sink.token])] += 1
    received = torch.stack(first)
    rows = [show({"what": "passages", "n": given.passages, "tokens": given.tokens})]
    for layer in range(received.shape[1]):
        of = received[:, layer]
        rows.append(show({
            "what": "primary sink", "layer": layer, "received": float(of.mean()),
            "share": float((of > EPSILON).float().mean()),
        }))  # fmt: skip
    for (birth, lifetime), n in sorted(Counter((s.birth, s.lifetime) for s in found).items()):
        rows.append(show({"what": "secondary sinks", "birth": birth, "lifetime": lifetime, "n": n}))
    for writer, n in sorted(Counter(s.writer for s in found).items()):
        rows.append(show({"what": "written by the MLP", "layer": writer, "n": n}))
    for word, n in words.most_common(10):
        rows.append(show({"what": "secondary token", "token": word, "n": n}))
    rows.append(show({
        "what": "write norm and lifetime", "n": len(found),
        "rank_correlation": rank_correlation(
            [s.write_norm for s in found], [float(s.lifetime) for s in found]
        ),
    }))  # fmt: skip
    save("secondary-sinks", "cpu", rows)


if __name__ == "__main__":
    main()
