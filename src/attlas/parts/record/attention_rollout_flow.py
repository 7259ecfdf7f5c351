"""Attention rollout and attention flow: what reaches a token through all layers below it.

    R_l = (mean over heads of A_l + I), rows divided by their sums
    rollout   J_0 = R_0,   J_l = R_l J_{l−1}
    flow      the largest flow from token i above layer l to token j of the input, in the graph whose
              edge from (layer m + 1, i) down to (layer m, j) holds R_m[i, j]; divided by i's sum
    raw       the mean over heads alone

What a token matters, by any of the three: its largest share over the queries, as the published code
takes it, or the row of the query that is read out.

Cost: the mean map of every layer is held, O(layers · T²); rollout is a product of two maps a layer.
One flow is a maximum-flow problem on O(l · T) nodes and O(l · T²) edges, and each query asks for T of
them: choose queries. SciPy finds them where it is installed, on capacities in 2⁻³⁰ths; else NetworkX,
which PyTorch brings, some hundred times slower. Reduces to R_0 in one layer.

Source: "Quantifying Attention Flow in Transformers".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attlas.attach.call import Call
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.parts.record.weights import Weights

#: What the capacity 1 is in whole numbers; no token sends more, so that sums stay below 2³¹.
UNIT = 2**30


def with_residual(
    maps: Float[Tensor, "layers *rows query key"]
) -> Float[Tensor, "layers *rows query key"]:
    """R: half a map that sums to one, half the token itself."""
    both = maps + torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    return both / both.sum(dim=-1, keepdim=True)


def rollout(maps: Float[Tensor, "layers *rows query key"]) -> Float[Tensor, "layers *rows query key"]:
    """J behind each layer: the product of its map and all below; of R, or of maps without residual."""
    found = [maps[0]]
    for one in maps[1:]:
        found.append(one @ found[-1])
    return torch.stack(found)


def flow(
    maps: Float[Tensor, "layers tokens tokens"], queries: Sequence[int]
) -> Float[Tensor, "queries tokens"]:
    """Flows from queries above the last of the layers to every token of the input, divided by their sums.

    Args:
        maps: R of the layers below them, of one text.
        queries: their numbers.
    """
    largest = _solver(maps)
    tokens = maps.shape[-1]
    found = torch.tensor([[largest(q, j) for j in range(tokens)] for q in queries], dtype=torch.float64)
    return (found / found.sum(dim=-1, keepdim=True)).to(maps)


def _solver(maps: Tensor) -> Callable[[int, int], float]:
    """The largest flow from a token above the layers to one of the input, by SciPy or NetworkX."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        return by_networkx(maps)
    return by_scipy(maps)


def _edges(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(from, to, capacity) of all edges that hold anything; inputs are the first nodes."""
    layer, query, key = maps.nonzero(as_tuple=True)
    tokens = maps.shape[-1]
    return (layer + 1) * tokens + query, layer * tokens + key, maps[layer, query, key]


def by_scipy(maps: Float[Tensor, "layers tokens tokens"]) -> Callable[[int, int], float]:
    """Flows in whole numbers, off by at most 2⁻³¹ for each edge of a cut."""
    import numpy as np
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_flow

    layers, tokens = maps.shape[:2]
    above, below, held = (x.cpu() for x in _edges(maps))
    whole = (held.double() * UNIT).round().numpy().astype(np.int32)
    nodes = (layers + 1) * tokens
    graph = csr_matrix((whole, (above.numpy(), below.numpy())), shape=(nodes, nodes))
    top = layers * tokens
    return lambda query, key: maximum_flow(graph, top + query, key).flow_value / UNIT


def by_networkx(maps: Float[Tensor, "layers tokens tokens"]) -> Callable[[int, int], float]:
    """Flows in floating point."""
    import networkx

    above, below, held = (x.tolist() for x in _edges(maps.double()))
    graph = networkx.DiGraph()
    graph.add_nodes_from(range((maps.shape[0] + 1) * maps.shape[1]))
    graph.add_weighted_edges_from(zip(above, below, held, strict=True), weight="capacity")
    top = maps.shape[0] * maps.shape[1]
    return lambda query, key: float(networkx.maximum_flow_value(graph, top + query, key))


@mechanism("attention-rollout-flow", aliases=("attention-rollout",))
class AttentionRolloutFlow(Weights):
    """Records the mean over (chosen) heads of every (chosen) layer's map, in original positions.

    The result is {"raw": [layers, batch, tokens, tokens], "rollout": likewise}; `flow` is worked out
    when it is asked for.
    """

    def measure(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Float[Tensor, "batch 1 query columns"]:
        """The block's mean over heads."""
        return super().measure(call, weights, queries, keys).mean(dim=1, keepdim=True)

    @property
    def raw(self) -> Float[Tensor, "layers batch tokens tokens"]:
        """The mean maps.

        Raises:
            ValueError: the record begins in the middle of a text, or is of another text's keys.
        """
        found: Tensor = super().result()[:, :, 0]
        if found.shape[-2] != found.shape[-1]:
            raise UserError(
                "rollout needs the maps of a whole text from its first token on; "
                f"{found.shape[-2]} queries and {found.shape[-1]} keys were recorded"
            )
        return found

    def result(self) -> Any:
        """Raw maps, and the rollout behind each layer."""
        raw = self.raw
        return {"raw": raw, "rollout": rollout(with_residual(raw))}

    def flow(
        self, layer: int = -1, queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch queries tokens"]:
        """Flow from queries above a layer to every token of the input.

        Args:
            layer: place among the recorded layers, negative ones from the last.
            queries: their numbers; all unless given.

        Raises:
            ValueError: a layer or query that was not recorded.
        """
        maps = with_residual(self.raw)
        layers, _, tokens = maps.shape[:3]
        asked = range(tokens) if queries is None else queries
        if not -layers <= layer < layers:
            raise UserError(f"layer must be one of the {layers} recorded ones, got {layer}")
        if wrong := [q for q in asked if not -tokens <= q < tokens]:
            raise UserError(f"queries must be among the {tokens} tokens recorded, got {wrong[0]}")
        below, places = maps[: layer % layers + 1], [q % tokens for q in asked]
        return torch.stack([flow(below[:, row], places) for row in range(maps.shape[1])])


def importance(
    shares: Float[Tensor, "*layers query key"]
) -> Float[Tensor, "*layers key"]:
    """What each token matters: its largest share over the queries, as the published code has it."""
    return shares.amax(dim=-2)
