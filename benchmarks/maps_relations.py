"""MAPS on SmolLM2: scores of relations read off the weights against those of the heads' outputs.

    python benchmarks/maps_relations.py [--pairs 24]

Told of each relation are Pearson's r over all heads, the best heads of both scores, and how many of the
ten best are the same. Copying maps words to themselves and is scored by the same k = 10.
"""

from __future__ import annotations

import argparse

import torch

import attlas
from attlas.analyses.maps_head_parameters import RELATIONS, MapsHeadParameters, seen_at_work
from attlas.inspect.subject import Subject
from attlas.kinds.analysis import Scores
from attlas.models.load import load_tokenizer
from common import save, show


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=24)
    given = parser.parse_args()
    subject = Subject(attlas.load("smollm2"), tokenizer=load_tokenizer("smollm2"))
    words = [word for word, _ in RELATIONS["first letter"]]
    relations = {name: pairs[: given.pairs] for name, pairs in RELATIONS.items()}
    relations["copying"] = [(word, word) for word in words[: given.pairs]]
    static = MapsHeadParameters(relations, copied=0).look(subject).heads
    rows = []
    for name, pairs in relations.items():
        with torch.no_grad():
            seen = Scores(seen_at_work(subject, pairs, 10), "at inference")
        both = torch.stack([static[name].values.flatten(), seen.values.flatten()])
        r = float(torch.corrcoef(both)[0, 1].nan_to_num())
        shared = len(set(static[name].top(10)) & set(seen.top(10)))
        best = [[*at, float(static[name].values[at])] for at in static[name].top(5)]
        rows.append(show({"relation": name, "pairs": len(pairs), "r": r, "shared of ten": shared,
                          "best": best, "best at inference": list(map(list, seen.top(5)))}))  # fmt: skip
    save("maps-relations", "cpu", rows)


if __name__ == "__main__":
    main()
