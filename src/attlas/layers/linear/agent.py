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
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from attlas import ops
from attlas.bases.grid import GridConv, OnGrid, start_small
from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.masks import Mask

#: Rows and columns of the pictures that are stretched to biases.
SIDE = 7


class PlaceBias(nn.Module):
    """What every agent adds to its scores, place by place.

    Args:
        heads: that have biases of their own.
        agents: of every head.
        grid: height and width that rows and columns have numbers for; None for no such numbers.
    """

    def __init__(self, heads: int, agents: int, grid: tuple[int, int] | None) -> None:
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
class AgentAttention(OnGrid):
    """Two softmax attentions by way of a few agents.

    Args:
        agents: of every head, a square number.
        reduction: side of the square of patches that one key stands for.
        kernel_size: rows and columns of the convolution, odd; None for none.
        place_bias: whether scores have biases.

    Raises:
        ValueError: agents that make no square, a reduction that does not divide the grid.
    """

    has_own_position = True

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, agents: int = 49, reduction: int = 1,
        kernel_size: int | None = 3, place_bias: bool = True, bias: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        self.side = math.isqrt(at_least_one("agents", agents))
        if self.side**2 != agents:
            raise ValueError(f"agents must be a square number, got {agents}")
        self.agents, self.reduction = agents, at_least_one("reduction", reduction)
        self.kernel_size, self.place_bias = kernel_size, place_bias
        super().__init__(dim, heads, *args, bias=self.bias, **options)

    def make_projections(self) -> None:
        """Projections that begin small, the convolution, the biases and what reduces the keys."""
        super().make_projections()
        start_small(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        self.conv = (
            None if self.kernel_size is None
            else GridConv(self.kv_heads * self.head_dim, self.kernel_size)
        )  # fmt: skip
        fewer = None if self.grid is None else self.reduced(self.grid)
        if self.place_bias:
            self.gather_bias = PlaceBias(self.heads, self.agents, fewer)
            self.spread_bias = PlaceBias(self.heads, self.agents, self.grid)
        if self.reduction > 1:
            self.reduce = nn.Conv2d(self.dim, self.dim, self.reduction, stride=self.reduction)
            self.reduce_norm = nn.LayerNorm(self.dim)

    def reduced(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the keys of such a picture.

        Raises:
            ValueError: a reduction that does not divide them.
        """
        if grid[0] % self.reduction or grid[1] % self.reduction:
            raise ValueError(f"reduction={self.reduction} must divide the grid, got {grid}")
        return grid[0] // self.reduction, grid[1] // self.reduction

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of all patches, keys and values of those that are left."""
        q, k, v = super().project(inputs)
        if self.reduction == 1:
            return q, k, v
        height, width = self.grid_of(inputs.x.shape[1])
        self.reduced((height, width))
        picture = rearrange(inputs.x, "b (h w) c -> b c h w", h=height, w=width)
        fewer = self.reduce_norm(rearrange(self.reduce(picture), "b c h w -> b (h w) c"))
        return q, self.split_heads(self.k_proj(fewer)), self.split_heads(self.v_proj(fewer))

    def maps(
        self,
        q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch kv_heads keys width"],
    ) -> tuple[
        Float[Tensor, "batch heads queries agents"], Float[Tensor, "batch heads agents keys"]
    ]:
        """What queries read from agents, and agents from keys."""
        grid = self.grid_of(q.shape[2])
        agents = self.pooled(q, grid)
        spread = q * self.scale @ agents.mT
        gather = ops.grouped_product(agents * self.scale, k.mT)
        if self.place_bias:
            spread = spread + self.spread_bias(grid).mT
            gather = gather + self.gather_bias(self.reduced(grid))
        dropped = [
            torch.dropout(ops.softmax(s), self.dropout, self.training) for s in (spread, gather)
        ]
        return dropped[0], dropped[1]

    def pooled(
        self, q: Float[Tensor, "batch heads queries width"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch heads agents width"]:
        """The agents: means of queries over the cells of their own grid."""
        picture = rearrange(q, "b n (h w) d -> b (n d) h w", h=grid[0], w=grid[1])
        cells = adaptive_avg_pool2d(picture, self.side)
        return rearrange(cells, "b (n d) h w -> b n (h w) d", n=q.shape[1])

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The product of the two maps."""
        spread, gather = self.maps(q, k)
        return spread @ gather

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries width"]:
        """Values to the agents, from them to the queries, and the neighbours."""
        spread, gather = self.maps(q, k)
        return self.with_neighbours(spread @ ops.grouped_product(gather, v), v)

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Weighted values and the neighbours; what drops out has done so in the two maps."""
        return self.with_neighbours(ops.grouped_product(weights, v), v)

    def with_neighbours(self, heads: Tensor, v: Tensor) -> Tensor:
        """Heads plus the convolution of the values, stretched over the grid where they are fewer."""
        if self.conv is None:
            return heads
        grid = self.grid_of(heads.shape[2])
        height, width = self.reduced(grid)
        flat = rearrange(v, "b n t d -> b t (n d)")
        if self.reduction > 1:
            picture = rearrange(flat, "b (h w) c -> b c h w", h=height, w=width)
            stretched = interpolate(picture, size=grid, mode="bilinear")
            flat = rearrange(stretched, "b c h w -> b (h w) c")
        return heads + self.per_query_head(self.split_heads(self.conv(flat, grid)), heads)
