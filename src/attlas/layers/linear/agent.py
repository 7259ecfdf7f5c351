"""Agent attention: a few agents gather from all keys, and all queries read from the agents.

    A = pool(q)      V_A = softmax(A kᵀ/√d + B₁) v      heads = softmax(q Aᵀ/√d + B₂) V_A
    weights = softmax(q Aᵀ/√d + B₂) softmax(A kᵀ/√d + B₁)      y = W_O concat_h ( heads_h + DWC(v)_h )

The agents are the means of the queries in the cells of a √a × √a grid. The biases know places: each is a
7 × 7 picture an agent and head, stretched over the grid, plus a number a row and one a column, which
are there where `grid` is told. The depthwise convolution gives back the variety that a map of rank a
has lost. With `reduction` r, keys and values come from r × r patches made one.

Cost: 4·n·a·d multiply-adds a head and n·dim·kernel², memory linear in n: no map of all pairs.
Reduces to no registered mechanism; it is generalised linear attention with the features
softmax(q Aᵀ) and softmax(A kᵀ)ᵀ. With neither biases nor a convolution it has a softmax layer's
parameters, and can take that layer's place without training.
Source: "Agent Attention: On the Integration of Softmax and Linear Attention" and its authors' program for
PVT, which has the reduction, whose values are stretched over the grid before the convolution, and drops
out of both maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from attlas import ops
from attlas.bases.grid import GridConv, OnGrid, merged, neighbours, reduced, start_small
from attlas.bases.recurrent import RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option

#: Rows and columns of the pictures that are stretched to biases.
SIDE = 7


class PlaceBias(nn.Module):
    """What every agent adds to its scores, place by place.

    Args:
        heads: that have biases of their own.
        agents: of every head.
        grid: height and width that rows and columns have numbers for; None for no such numbers.
    """

    def __init__(self, heads: int, agents: int, grid: Sequence[int] | None) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.zeros(heads, agents, SIDE, SIDE))
        self.rows = self.columns = None
        if grid is not None:
            self.rows = nn.Parameter(torch.zeros(heads, agents, grid[0], 1))
            self.columns = nn.Parameter(torch.zeros(heads, agents, 1, grid[1]))
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "heads agents tokens"]:
        """The biases of a picture's tokens."""
        bias = interpolate(self.picture, size=grid, mode="bilinear")
        if self.rows is not None and self.columns is not None:
            bias = bias + self.rows + self.columns
        return bias.flatten(2)


@mechanism("agent-attention", aliases=("agent",))
class AgentAttention(OnGrid, RecurrentAttention):
    """Two softmax attentions by way of a few agents."""

    supports = replace(OnGrid.supports, position=False, cache="state")
    beyond = ("project: the published PVT model makes keys from squares of patches",)
    normalized = False

    bias: bool = option("whether the projections have one", default=True)
    agents: int = option("agents of every head, a square number", default=49, at_least=1)
    reduction: int = option(
        "side of the square of patches that one key stands for", default=1, at_least=1
    )
    kernel_size: int | None = option(
        "rows and columns of the convolution of the values, odd; None for none", default=3
    )
    place_bias: bool = option("whether scores have biases", default=True)

    def setup(self) -> None:
        """Projections that begin small, the convolution, the biases and what reduces the keys.

        Raises:
            ValueError: agents that make no square, a reduction that does not divide the grid.
        """
        super().setup()
        self.side = math.isqrt(self.agents)
        if self.side**2 != self.agents:
            raise ValueError(f"agents must be a square number, got {self.agents}")
        start_small(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        self.conv = None
        if self.kernel_size is not None:
            self.conv = GridConv(self.kv_heads * self.head_dim, self.kernel_size)
        fewer = None if self.grid is None else reduced(self.grid, self.reduction)
        if self.place_bias:
            self.gather_bias = PlaceBias(self.heads, self.agents, fewer)
            self.spread_bias = PlaceBias(self.heads, self.agents, self.grid)
        if self.reduction > 1:
            self.reduce = nn.Conv2d(self.dim, self.dim, self.reduction, stride=self.reduction)
            self.reduce_norm = nn.LayerNorm(self.dim)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of all patches, keys and values of those that are left."""
        x, grid = inputs.x, self.grid_of(inputs.x.shape[1])
        fewer = x if self.reduction == 1 else self.reduce_norm(merged(x, self.reduce, grid))
        q, k, v = self.q_proj(x), self.k_proj(fewer), self.v_proj(fewer)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What queries read from agents [batch, heads, queries, agents], and agents from keys
        [batch, heads, keys, agents]."""
        grid = self.grid_of(q.shape[2])
        agents = self.pooled(q, grid) * self.head_dim**-0.5
        spread = q @ agents.mT
        gather = ops.grouped_product(agents, k.mT)
        if self.place_bias:
            spread = spread + self.spread_bias(grid).mT
            gather = gather + self.gather_bias(reduced(grid, self.reduction))
        spread, gather = (
            torch.dropout(ops.softmax(s), self.dropout, self.training) for s in (spread, gather)
        )
        return spread, gather.mT

    def pooled(
        self, q: Float[Tensor, "batch heads queries width"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch heads agents width"]:
        """The agents: means of queries over the cells of their own grid."""
        picture = rearrange(q, "b n (h w) d -> b (n d) h w", h=grid[0], w=grid[1])
        cells = adaptive_avg_pool2d(picture, self.side)
        return rearrange(cells, "b (n d) h w -> b n (h w) d", n=q.shape[1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Values to the agents, from them to the queries, and the neighbours. What drops out has done so
        in the two maps, so that this route is the right one while training, too."""
        return self.recur(q, k, v, inputs) + self.near(v, q)

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Weighted values and the neighbours; what drops out has done so in the two maps."""
        return ops.grouped_product(weights, v) + self.near(v, weights)

    def near(self, v: Tensor, like: Tensor) -> Tensor | float:
        """The convolution of the values, stretched over the grid of the queries where they are fewer."""
        grid = self.grid_of(like.shape[2])
        if self.reduction > 1:
            height, width = reduced(grid, self.reduction)
            picture = rearrange(v, "b n (h w) d -> b (n d) h w", h=height, w=width)
            stretched = interpolate(picture, size=grid, mode="bilinear")
            v = rearrange(stretched, "b (n d) h w -> b n (h w) d", n=v.shape[1])
        return neighbours(self.conv, v, grid, like.shape[1])
