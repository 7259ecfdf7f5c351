"""A small network that is written to while it reads: many sets of weights, one a chunk of tokens.

    M(x) = MLP(x), or x + LayerNorm(MLP(x)) (1 + γ)          GELU between the layers of the MLP

All weights of one network stand in a row of |M| numbers, so that momentum and forgetting are linear
recurrences of rows. The first weights are trained parameters, one network a head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import grad
from torch.nn.functional import gelu, layer_norm

from attlas import ops


class State(NamedTuple):
    """What a memory is between two passes, for every row and head.

    Attributes:
        base: weights that gradients are taken at.
        memory: M.
        surprise: S.
    """

    base: Float[Tensor, "batch heads numbers"]
    memory: Float[Tensor, "batch heads numbers"]
    surprise: Float[Tensor, "batch heads numbers"]


class MemoryMLP(nn.Module):
    """Networks of every head.

    Args:
        heads: how many networks.
        width: of what goes in and what comes out.
        depth: layers of weights.
        expansion: width of hidden layers, in widths.
        residual: whether the normalised output is added to the input.
    """

    def __init__(
        self, heads: int, width: int, *, depth: int, expansion: float, residual: bool
    ) -> None:
        super().__init__()
        self.depth, self.residual = depth, residual
        hidden = max(1, int(expansion * width))
        widths = pairwise([width, *[hidden] * (depth - 1), width])
        first = [nn.init.xavier_uniform_(torch.zeros(a, b)) for a, b in widths]
        first += [torch.zeros(width)] if residual else []
        # All heads begin alike; what they read sets them apart.
        self.first = nn.ParameterList(nn.Parameter(w.repeat(heads, *[1] * w.ndim)) for w in first)

    def row(self) -> Float[Tensor, "heads numbers"]:
        """The first weights."""
        return torch.cat([w.flatten(1) for w in self.first], dim=-1)

    def weights(self, rows: Float[Tensor, "*places numbers"]) -> list[Tensor]:
        """What rows hold, as matrices, and γ behind them."""
        parts = rows.split([w[0].numel() for w in self.first], dim=-1)
        return [x.unflatten(-1, w.shape[1:]) for x, w in zip(parts, self.first, strict=True)]

    def forward(
        self, rows: Float[Tensor, "*places numbers"], x: Float[Tensor, "*places tokens width"]
    ) -> Float[Tensor, "*places tokens width"]:
        """M(x), each place with weights of its own."""
        return self.said(rows, x)

    def said(
        self, rows: Float[Tensor, "*places numbers"], x: Float[Tensor, "*places tokens width"]
    ) -> Float[Tensor, "*places tokens width"]:
        """The same without the hooks of a module's call, which fail while a gradient is taken inside one:
        what counts operations sets such hooks."""
        weights = self.weights(rows)
        y: Tensor = x
        for i, weight in enumerate(weights[: self.depth]):
            y = (gelu(y) if i else y) @ weight
        if self.residual:
            y = x + (1 + weights[-1][..., None, :]) * layer_norm(y, y.shape[-1:])
        return y

    def gradient(
        self, rows: Float[Tensor, "*places numbers"], k: Float[Tensor, "*places tokens width"],
        v: Float[Tensor, "*places tokens width"], step: Float[Tensor, "*places tokens 1"],
    ) -> Float[Tensor, "*places numbers"]:  # fmt: skip
        """Of Σ step · mean |M(k) − v|², the mean over the channels; for every place by itself."""

        def loss(rows: Tensor) -> Tensor:
            apart: Tensor = self.said(rows, k) - v
            return (step * apart.square()).sum() / k.shape[-1]

        found: Tensor = grad(loss)(rows)
        return found

    def learn(
        self, k: Float[Tensor, "batch heads chunks tokens width"],
        v: Float[Tensor, "batch heads chunks tokens width"],
        step: Float[Tensor, "batch heads chunks tokens 1"], idle: Bool[Tensor, "batch 1 chunks"],
        keep: Float[Tensor, "batch heads chunks"], carry: Float[Tensor, "batch heads chunks"] | None,
        state: State,
    ) -> tuple[Float[Tensor, "batch heads chunks numbers"], State]:  # fmt: skip
        """(the memory after every chunk, the state after the last), all gradients at `state.base`.

        Args:
            k: what M is asked.
            v: what M should have said.
            step: θ of every token.
            idle: chunks that change nothing, of which `keep` and `carry` are 0.
            keep: log (1 − α).
            carry: log η; None for no momentum.
            state: before the first chunk.
        """
        each = state.base[:, :, None].expand(*k.shape[:3], -1)
        u, surprise = -self.gradient(each, k, v, step), state.surprise
        u = u.masked_fill(idle[..., None], 0.0)
        if carry is not None:
            u, surprise = _scan(u, carry, surprise)
            u = u.masked_fill(idle[..., None], 0.0)
        after, memory = _scan(u, keep, state.memory)
        return after, State(state.base, memory, surprise)


def _scan(x: Tensor, log_decay: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """s_n = e^g s_{n−1} + x_n for every n, and the last of them."""
    ones = torch.ones_like(x[..., :1])
    out, last = ops.recurrence(
        ones, ones, x, log_decay=log_decay, initial_state=before[:, :, None]
    )  # fmt: skip
    assert last is not None
    return out, last[:, :, 0]
