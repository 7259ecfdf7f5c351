"""Attention seen at three scales: lines of a head, thumbnails of the model, neurons of one query.

    score(i, j)  = scaling · Σ_c q_ic k_jc        the neuron view shows q_i, k_j and each q_ic k_jc
    weight(i, j) = softmax_j score(i, j)          over all keys, not only those that are shown

Queries and keys are those that are multiplied: behind their rotation, before scaling; a grouped key
serves several heads. Weights of a part of the text are as they are and not made to sum to one.

Cost: of a window of W tokens W² weights and 2·W·d numbers a head.
Source: "A Multiscale Visualization of Attention in the Transformer Model".
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attlas.attach.call import Call, ForwardPass
from attlas.attach.part import Recorder
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.parts.record.pyramid import Pyramid


@dataclass(frozen=True)
class Neuron:
    """One head's queries and keys over a window of tokens.

    Attributes:
        q: queries as they are multiplied (rotated where the model rotates), before scaling.
        k: keys likewise, of the head that serves this one.
        weights: after the softmax over all keys, not only those of the window.
        first: the token that the window's first row belongs to.
        scaling: score = scaling · q·k, before masks and biases.
        causal: whether a query sees no later key.
    """

    q: Float[Tensor, "rows dim"]
    k: Float[Tensor, "keys dim"]
    weights: Float[Tensor, "rows keys"]
    first: int
    scaling: float
    causal: bool = True

    def score(self, query: int, key: int) -> tuple[Tensor, float]:
        """(the products of each neuron, the score before softmax) of a pair of the window's rows."""
        products = self.q[query] * self.k[key]
        return products, self.scaling * float(products.double().sum())


@mechanism("multiscale-attention-view")
class MultiscaleAttentionView(Recorder):
    """Records q, k and weights of heads over a window of tokens.

    The result is {"q" and "k": [layers, batch, heads, window, dim], "weights": [layers, batch, heads,
    window, window]}; keys are told for each query head. `patterns` and `neurons` are what the page
    takes. The record is of one sequence: it grows while a cache carries the sequence on.
    """

    changes = ("project",)

    first: int = option("the first token of the window", default=0, at_least=0)
    tokens: int = option("tokens of the window at most", default=64, at_least=1)

    def setup(self) -> None:
        """Nothing is recorded yet."""
        super().setup()
        self._held: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self._told: dict[int, tuple[float, bool]] = {}

    def begin(self, forward_pass: ForwardPass) -> None:
        """A call without a past begins a new sequence."""
        if forward_pass.offset == 0:
            self._held.clear()

    def take_back(self, seen: int) -> None:
        """Forget tokens behind the first `seen`."""
        room = max(0, seen - self.first)
        for name, layer in self._held:
            rows = self._stacked(name, layer)[:, :, :room]
            self._held[name, layer] = [rows[..., :room] if name == "weights" else rows]

    def observe(self, call: Call) -> None:
        """Keep the window's queries and keys."""
        own, chosen = call.q.shape[2], self.where.heads_of(call.layer)
        inside = self._inside(call.queries)
        for name, x in ("q", call.q), ("k", call.k[:, :, -own:]):
            if name == "k":
                x = x.repeat_interleave(call.groups, dim=1)
            x = x if chosen is None else x[:, list(chosen)]
            self._held[name, call.layer].append(x[:, :, inside].detach().float().cpu())
        # With several queries and no mask it is told; a mask tells it by hiding later keys.
        causal = call.is_causal or (call.mask is not None and own > 1 and not _sees_later(call.mask))
        if own > 1 or call.layer not in self._told:
            self._told[call.layer] = call.scaling, causal or own == 1

    def update(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Keep the window's weights, in original positions."""
        if keys.ndim > 1:
            columns = call.forward_pass.offset + call.q.shape[2]
            at = keys.clamp(min=0).long()[:, :, None].expand_as(weights)
            weights = weights.new_zeros(*weights.shape[:3], columns).scatter_add_(-1, at, weights)
        rows = weights[:, :, self._inside(queries), self.first : self.first + self.tokens]
        self._held["weights", call.layer].append(rows.detach().float().cpu())

    def _inside(self, positions: Tensor) -> Tensor:
        """Which tokens stand in the window."""
        return (positions >= self.first) & (positions < self.first + self.tokens)

    def _stacked(self, name: str, layer: int) -> Float[Tensor, "batch heads window width"]:
        blocks = self._held[name, layer]
        if len({len(block) for block in blocks}) > 1:
            raise UserError(
                "MultiscaleAttentionView recorded rows that were repeated since: which of them stayed "
                "is not known; record in a session of its own"
            )
        widest = max(block.shape[-1] for block in blocks)
        return torch.cat([F.pad(b, (0, widest - b.shape[-1])) for b in blocks], dim=2)

    def result(self) -> Any:
        """Queries, keys and weights, layers in the model's order."""
        found: defaultdict[str, list[Tensor]] = defaultdict(list)
        for name, layer in sorted(self._held):
            found[name].append(self._stacked(name, layer))
        return {name: torch.stack(layers) for name, layers in found.items()}

    def neurons(self, row: int = 0) -> dict[tuple[int, int], Neuron]:
        """(layer, head) -> the neuron view of it, of one row of the batch."""
        found = {}
        for layer, (scaling, causal) in sorted(self._told.items()):
            q, k, weights = (self._stacked(name, layer)[row] for name in ("q", "k", "weights"))
            for number, head in enumerate(self.where.heads_of(layer) or range(len(q))):
                found[layer, head] = Neuron(
                    q[number], k[number], weights[number], self.first, scaling, causal
                )
        return found

    def patterns(self, row: int = 0) -> dict[tuple[int, int], Pyramid]:
        """(layer, head) -> its pattern, of a window that holds the whole text.

        Raises:
            ValueError: a window that begins later.
        """
        if self.first:
            raise UserError(f"patterns are of whole texts, and the window begins at {self.first}")
        return {at: Pyramid.of(neuron.weights) for at, neuron in self.neurons(row).items()}


def _sees_later(mask: Tensor) -> bool:
    """Whether any query may attend to a key behind it."""
    queries, keys = mask.shape[-2:]
    return bool(mask.triu(diagonal=keys - queries + 1).any())
