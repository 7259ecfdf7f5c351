"""The page of an inspection: what was found, as the views of `attlas.view.look` take it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attlas.inspect.look import Looked
from attlas.kinds.analysis import Scores
from attlas.view.look.atlas import Atlas
from attlas.view.look.contents import Circuit, Compare, Edge, Flow, Grid, Joint, Node, Table

#: Links drawn from each token to those that it takes most from.
LINKS = 8
#: Edges of a circuit that are drawn, the heaviest.
EDGES = 60


def atlas(looked: Looked) -> Atlas:
    """Everything that was found, to be written as a page or shown in a notebook."""
    arrays = {name: x for found in looked.findings.values() for name, x in found.arrays.items()}
    tables = [table for found in looked.findings.values() for table in found.tables]
    against = looked.against
    return Atlas(
        model=looked.name,
        tokens=words(looked) or ["(no text)"],
        scores=_grids(looked.scores),
        patterns=looked.patterns,
        neurons=looked.neurons,
        flow=_flow(arrays["flow"]) if "flow" in arrays else None,
        circuit=_circuit(arrays["circuit"], looked) if "circuit" in arrays else None,
        joint=dict(_joint(arrays["joint"], looked)) if "joint" in arrays else {},
        tables=[Table(t.title, t.columns, t.rows) for t in tables],
        says=[sentence for found in looked.findings.values() for sentence in found.says],
        compare=None if against is None else Compare(against[0], _grids(against[1])),
    )


def words(looked: Looked) -> list[str]:
    """The tokens of the first text as they are read."""
    ids = looked.subject.input_ids
    if ids is None:
        return []
    tokenizer = looked.subject.tokenizer
    if tokenizer is None:
        return [str(number) for number in ids[0].tolist()]
    return [tokenizer.decode([number]) for number in ids[0].tolist()]


def _grids(scores: dict[str, Scores] | Any) -> dict[str, Grid]:
    return {name: Grid(each.values.float().cpu(), each.meaning) for name, each in scores.items()}


def _flow(share: Tensor) -> Flow:
    """[layers, tokens, tokens] as each token's strongest links."""
    weight, index = share.float().cpu().topk(min(LINKS, share.shape[-1]), dim=-1)
    return Flow(index.masked_fill(weight <= 0, -1), weight, "share that a token takes of an earlier one")


def _circuit(edges: Tensor, looked: Looked) -> Circuit:
    """Edges [n, 5] as a graph."""
    rows = edges[edges[:, 4].abs().argsort(descending=True)][:EDGES].tolist()
    nodes: dict[tuple[int, int], int] = {}
    for row in rows:
        for at in ((int(row[0]), int(row[1])), (int(row[2]), int(row[3]))):
            nodes.setdefault(at, len(nodes))
    drawn = [_node(layer, head, looked.subject.layers) for layer, head in nodes]
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


def _joint(points: Tensor, looked: Looked) -> Iterator[tuple[tuple[int, int], Joint]]:
    """[layers, heads, 2, tokens, 2] as a map of each head."""
    layers, heads, _, count, _ = points.shape
    told = words(looked)[:count]
    place = torch.arange(count).repeat(2)
    is_query = torch.arange(2 * count) < count
    for layer in range(layers):
        for head in range(heads):
            flat = points[layer, head].flatten(0, 1).float().cpu()
            yield (layer, head), Joint(flat, is_query, place, [*told, *told])
