"""CoulGAT: graph attention whose neighbourhoods decay with learnt powers of the adjacency.

    v = W x + b,   P = softmax_l(A_jl^p_jl),   k_j = Σ_l P_jl v_l,   s_ij = LeakyReLU(a_i·k_j)
    y = concat_h ReLU(softmax(s) v)     or     ReLU(mean_h softmax(s) v)

A [batch, n, n] is given to `forward` as `adjacency`, say a screened Coulomb potential between nodes;
without it all pairs have adjacency 1. A 0 stays 0 at every power. p, a and b belong to nodes, by
their positions; hidden pairs are left out of both softmaxes. There is no output projection.
In residual stacks the ReLU stands before the layer, not after, and the caller adds x.

Cost: plain attention, n²·dim for the neighbourhoods and n² powers; memory quadratic in n.
Reduces to the given adjacency at powers 1, and to no softmax attention: a query does not see its node.
Source: "CoulGAT: An Experiment on Interpretability of Graph Attention Networks" and its author's
program, whose initialisation, slope and 29 nodes (of its example) these are. There a coupling of 0 at
a negative power is an Inf.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.masks import Mask


@mechanism("coulgat", example={"nodes": 384})
class CoulGAT(Attention):
    """Graph attention with learnt powers of a weighted adjacency.

    Args:
        nodes: of the largest graph.
        join: of heads, "concat" or "mean"; for the latter every head is as wide as the layer.
        activation: "after", or "before" in residual stacks.
        slope: of the leaky ReLU.
    """

    has_causal_form = False
    has_cross_form = False
    has_own_position = True
    memory_law = "quadratic"
    extras = ("adjacency",)
    expected_failures: ClassVar[dict[str, str]] = {
        "gradients-reach": "without an adjacency all pairs have 1, which is 1 at every power"
    }

    def __init__(
        self, dim: int, heads: int = 8, kv_heads: int | None = None, head_dim: int | None = None,
        *, nodes: int = 29, join: str = "concat", activation: str = "after", slope: float = 0.2,
        bias: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        if join not in ("concat", "mean"):
            raise ValueError(f"join must be concat or mean, got {join!r}")
        if activation not in ("after", "before"):
            raise ValueError(f"activation must be after or before, got {activation!r}")
        self.nodes, self.join = at_least_one("nodes", nodes), join
        self.activation, self.slope = activation, slope
        width = dim if join == "mean" and head_dim is None else head_dim
        super().__init__(dim, heads, kv_heads, width, bias=self.bias, **options)

    def make_projections(self) -> None:
        """W, and for every node a, its powers and b."""
        if self.head_dim * (self.heads if self.join == "concat" else 1) != self.dim:
            raise ValueError(
                f"head_dim={self.head_dim} must make heads, joined, dim={self.dim} wide"
            )
        self.v_proj = nn.Linear(self.dim, self.kv_heads * self.head_dim, bias=False)
        self.a = nn.Parameter(torch.empty(self.heads, self.nodes, self.head_dim))
        self.power = nn.Parameter(torch.empty(self.heads, self.nodes, self.nodes))
        for each in (*self.v_proj.weight.chunk(self.kv_heads), *self.a, *self.power):
            nn.init.xavier_uniform_(each)
        b = torch.zeros(self.kv_heads, self.nodes, self.head_dim)
        self.b = nn.Parameter(b) if bias else None

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """q are the nodes' vectors a; keys and values are W x + b."""
        x, at = inputs.x, self.places(inputs)
        if x.shape[1] > self.nodes:
            raise ValueError(f"x must have at most nodes={self.nodes} nodes, got {x.shape[1]}")
        v = self.v_proj(x.relu() if self.activation == "before" else x)
        v = v.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if self.b is not None:
            v = v + self.b[:, at].transpose(0, 1)
        return self.a[:, at].transpose(0, 1).expand(len(x), -1, -1, -1), v, v

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """LeakyReLU of products, not scaled."""
        return leaky_relu(ops.grouped_product(q, k.transpose(-1, -2)), self.slope)

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Attention to neighbourhoods."""
        near = self.neighbourhoods(mask, inputs)
        return super().weigh(q, ops.grouped_product(near, k), mask, inputs)

    def neighbourhoods(self, mask: Mask | Tensor | None, inputs: Inputs) -> Tensor:
        """P [batch, heads, nodes, nodes]."""
        at, n = self.places(inputs), inputs.x.shape[1]
        power = self.power[:, at[:, :, None], at[:, None, :]].transpose(0, 1)
        given = inputs.extras.get("adjacency")
        if given is None:
            scores = torch.ones_like(power)
        elif given.shape != (wanted := (len(inputs.x), n, n)):
            raise ValueError(f"adjacency must be {list(wanted)}, got {list(given.shape)}")
        else:
            given = given.to(power.dtype)[:, None]
            # Through the logarithm, where an overflow can be held back before it makes an Inf.
            most = math.log(torch.finfo(power.dtype).max) - 1
            logs = given.masked_fill(given == 0, 1.0).log() * power
            scores = logs.clamp(max=most).exp().masked_fill(given == 0, 0.0)
        visible = ops.as_dense(mask, n, n, 0, power.device)
        scores = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
        return ops.softmax(scores).expand(len(inputs.x), -1, -1, -1)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads joined."""
        y: Tensor = heads.mean(1) if self.join == "mean" else heads.transpose(1, 2).flatten(2)
        return y.relu() if self.activation == "after" else y

    def places(self, inputs: Inputs) -> Tensor:
        """Which node each token is [batch or 1, nodes]."""
        places: Tensor = torch.atleast_2d(inputs.positions)
        return places
