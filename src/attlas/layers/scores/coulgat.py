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
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports, share_of_dim


@mechanism("coulgat", example={"nodes": 384})
class CoulGAT(Attention):
    """Graph attention with learnt powers of a weighted adjacency."""

    supports = Supports(
        causal=False, cross=False, position=False, memory="quadratic", extras=("adjacency",),
        queries="all",
    )  # fmt: skip
    changes = ("normalize",)
    beyond = (
        "project: one projection makes keys and values, and queries are parameters of the nodes",
        "output: heads are joined or averaged without a projection",
    )
    expected_failures: ClassVar[dict[str, str]] = {
        "gradients-reach": "without an adjacency all pairs have 1, which is 1 at every power"
    }

    head_dim: int = option(
        "width of a head; unless given dim / heads, or dim where heads are averaged", at_least=1,
        factory=lambda layer: layer.dim if layer.join == "mean" else share_of_dim(layer),
        kw_only=False,
    )  # fmt: skip
    bias: bool = option("whether every node has a bias b", default=True)
    nodes: int = option("nodes of the largest graph", default=29, at_least=1)
    join: Literal["concat", "mean"] = option(
        "what happens to the heads' outputs; for mean every head is as wide as the layer",
        default="concat",
    )
    activation: Literal["after", "before"] = option(
        "where the ReLU stands; before in residual stacks", default="after"
    )
    slope: float = option("of the leaky ReLU below 0", default=0.2)

    def setup(self) -> None:
        """For every node a, its powers and b."""
        if self.head_dim * (self.heads if self.join == "concat" else 1) != self.dim:
            raise ValueError(
                f"head_dim={self.head_dim} must make heads, joined, dim={self.dim} wide"
            )
        super().setup()
        self.a = nn.Parameter(torch.empty(self.heads, self.nodes, self.head_dim))
        self.power = nn.Parameter(torch.empty(self.heads, self.nodes, self.nodes))
        for each in (*self.a, *self.power):
            nn.init.xavier_uniform_(each)
        b = torch.zeros(self.kv_heads, self.nodes, self.head_dim)
        self.b = nn.Parameter(b) if self.bias else None

    def make_projections(self) -> None:
        """W."""
        self.v_proj = nn.Linear(self.dim, self.kv_heads * self.head_dim, bias=False)
        for head in self.v_proj.weight.chunk(self.kv_heads):
            nn.init.xavier_uniform_(head)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """q are the nodes' vectors a; keys and values are W x + b."""
        x, at = inputs.x, self.places(inputs)
        if x.shape[1] > self.nodes:
            raise ValueError(f"x must have at most nodes={self.nodes} nodes, got {x.shape[1]}")
        v = self.split_heads(self.v_proj(x.relu() if self.activation == "before" else x))
        if self.b is not None:
            v = v + self.b[:, at].transpose(0, 1)
        return self.a[:, at].transpose(0, 1).expand(len(x), -1, -1, -1), v, v

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """LeakyReLU of products with neighbourhoods, not scaled."""
        near = ops.grouped_product(self.neighbourhoods(q, k, inputs), k)
        return leaky_relu(ops.grouped_product(q, near.transpose(-1, -2)), self.slope)

    def neighbourhoods(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
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
        visible = inputs.visible(q, k)
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
