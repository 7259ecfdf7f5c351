"""Findings as the views of `attlas.view.look` take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from attlas.kinds.analysis import Scores
from attlas.view.look.contents import Circuit, Edge, Flow, Grid, Joint, Node

#: Links drawn from each token to those that it takes most from.
LINKS = 8
#: Edges of a circuit that are drawn, the heaviest.
EDGES = 60


def grids(scores: Mapping[str, Scores]) -> dict[str, Grid]:
    """Scores of heads as coloured grids."""
    return {name: Grid(each.values.float().cpu(), each.meaning) for name, each in scores.items()}


def flow(share: Tensor) -> Flow:
    """[layers, tokens, tokens] as each token's strongest links."""
    weight, index = share.float().cpu().topk(min(LINKS, share.shape[-1]), dim=-1)
    return Flow(index.masked_fill(weight <= 0, -1), weight, "share that a token takes of an earlier one")


def circuit(edges: Tensor, layers: int) -> Circuit:
    """Edges [n, 5] as a graph."""
    rows = edges[edges[:, 4].abs().argsort(descending=True)][:EDGES].tolist()
    nodes: dict[tuple[int, int], int] = {}
    for row in rows:
        for at in ((int(row[0]), int(row[1])), (int(row[2]), int(row[3]))):
            nodes.setdefault(at, len(nodes))
    drawn = [_node(layer, head, layers) for layer, head in nodes]
    joined = [
        Edge(nodes[int(a), int(b)], nodes[int(c), int(d)], weight) for a, b, c, d, weight in rows
    ]
    return Circuit(drawn, joined, "effect of the sender on the answer through the receiver")


def _node(layer: int, head: int, layers: int) -> Node:
    if layer < 0:
        return Node("embedding", -1)
    if layer >= layers:
        return Node("logits", layers)
    return Node("mlp", layer) if head < 0 else Node("head", layer, head)


def joint(points: Tensor, told: Sequence[str]) -> Iterator[tuple[tuple[int, int], Joint]]:
    """[layers, heads, 2, tokens, 2] as a map of each head."""
    layers, heads, _, count, _ = points.shape
    place = torch.arange(count).repeat(2)
    is_query = torch.arange(2 * count) < count
    for layer in range(layers):
        for head in range(heads):
            flat = points[layer, head].flatten(0, 1).float().cpu()
            yield (layer, head), Joint(flat, is_query, place, [*told[:count], *told[:count]])
