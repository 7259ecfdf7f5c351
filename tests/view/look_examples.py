"""An atlas of made-up numbers with every view, and text that wants to be more than text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attlas.view.look.atlas import Atlas
from attlas.view.look.contents import (
    Circuit,
    Compare,
    Edge,
    Flow,
    Grid,
    Joint,
    Neuron,
    Node,
    Pyramid,
    Table,
)

EVIL = "</script><script>alert(1)</script>&{data}<img src=x onerror=alert(2)>"
WORDS = [
    "the", "old", "keeper", "counted", "lights", "of", "fishing", "boats", "and", "drew", "a", "small",
    "circle", "for", "each", "one",
]  # fmt: skip


def causal(tokens: int, seed: int = 0, *, previous: float = 4.0) -> Tensor:
    """Weights of a head that looks at the token before, and at the first."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, tokens, generator=generator)
    scores.diagonal(-1).add_(previous)
    scores[:, 0] += 3
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(dim=-1)


def text(tokens: int) -> list[str]:
    odd = [EVIL, "\n", "\x07", "\u202etxt", " ", "\ud800", "naïve"]
    return ([" " + WORDS[i % len(WORDS)] for i in range(tokens - len(odd))] + odd)[:tokens]


def example(tokens: int = 60) -> Atlas:
    """Six layers of four heads, all views, a comparison."""
    torch.manual_seed(0)
    layers, heads, window, dim = 6, 4, min(24, tokens), 16
    score = torch.rand(layers, heads)
    score[0, 1] = math.nan
    q, k = torch.randn(window, dim), torch.randn(window, dim)
    weights = (q @ k.T * 0.25).masked_fill(torch.ones(window, window).triu(1).bool(), -math.inf)
    at = torch.arange(tokens)
    index = torch.stack([at - 1, torch.zeros_like(at), at], dim=-1).expand(layers, tokens, 3)
    share = torch.rand(layers, tokens, 3) / 3
    nodes = [Node("embedding", -1), Node("head", 1, 2, 0.9), Node("mlp", 3, None, 0.2),
             Node("head", 4, 0, 0.5), Node("logits", layers)]  # fmt: skip
    edges = [Edge(0, 1, 0.8), Edge(1, 2, 0.1), Edge(1, 3, 0.6), Edge(3, 4, -0.7), Edge(2, 4, 0.3)]
    return Atlas(
        f"model {EVIL}", text(tokens),
        scores={"induction": Grid(score, f"how much it copies {EVIL}"),
                "sink": Grid(torch.rand(layers, heads), "")},
        patterns={(1, 2): Pyramid.of(causal(tokens)),
                  (4, 0): Pyramid.of(causal(tokens, 1, previous=0.0))},
        neurons={(1, 2): Neuron(q, k, weights.softmax(dim=-1), 0, 0.25)},
        flow=Flow(index, share, "three sources each"),
        circuit=Circuit(nodes, edges, "made up"),
        joint={(1, 2): Joint(torch.randn(40, 2), torch.arange(40) < 20, torch.arange(40) % 20,
                             [f"t{i % 20}" for i in range(40)], torch.rand(40))},
        tables=[Table(f"heads {EVIL}", ["head", "score"], [["1.2", 0.9], ["4.0", None], [EVIL, 3]])],
        says=[f"Head 1.2 copies. {EVIL}"],
        compare=Compare("other", {"induction": Grid(torch.rand(layers, heads))}),
    )  # fmt: skip
