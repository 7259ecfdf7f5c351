"""Focused linear attention: features whose direction is sharpened, and neighbours that restore rank.

    f_p(x) = |x| · x^p / |x^p|          φ(x) = f_p( (relu(x) + ε) / softplus(s) )
    weights_ij = φ(q_i)·φ(k_j + P_j) / (Σ_r φ(q_i)·φ(k_r + P_r) + n ε)
    y = W_O concat_h ( weights_h v_h + DWC(v_h) )

f_p leaves norms as they are and turns similar features closer, dissimilar ones apart. Its norms are
over the channels of all heads. The depthwise convolution of a head's values, with kernels that all heads
share, lets the map's rank exceed a head's width. P has a learned vector for every place, so it is there
where `grid` is told. With `reduction` r, keys and values come from r × r patches made one.

Cost: 2·n·d² multiply-adds a head and n·d·kernel², memory linear in n.
Reduces to no registered mechanism; to linear attention with relu(x) at p = 1 without the convolution.
Source: "FLatten Transformer: Vision Transformer using Focused Linear Attention". ε and s are in the
authors' program, and not in the paper's equations. There the convolution of reduced values first
stretches them to n tokens along the flattened order, linearly, as here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import interpolate, softplus

from attlas import ops
from attlas.bases.grid import GridConv, OnGrid, merged, neighbours, reduced, start_small
from attlas.bases.recurrent import RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.positions import Position


@mechanism("focused-linear-attention", aliases=("flatten", "focused-linear"))
class FocusedLinear(OnGrid, RecurrentAttention):
    """Linear attention with the focusing map and a depthwise convolution of the values."""

    supports = replace(OnGrid.supports, cache="state")
    #: The convolution is added to what the heads give.
    changes = ("output",)
    beyond = (
        "project: with `reduction`, as in the published PVT model, one key stands for many patches",
        "position: such keys have no place of their own that could rotate them",
    )

    bias: bool = option("whether the projections have one", default=True)
    power: float = option("p of the focusing map", default=3.0, at_least=1)
    reduction: int = option(
        "side of the square of patches that one key stands for", default=1, at_least=1
    )
    kernel_size: int | None = option(
        "rows and columns of the convolution of the values, odd; None for none", default=5
    )
    eps: float = option(
        "added to the features and to the mean product that divides", default=1e-6, above=0
    )

    def setup(self) -> None:
        """The convolution, what reduces the keys, their places, and the channels' scale.

        Raises:
            ValueError: a reduction that does not divide the grid, or rotated keys that are reduced.
        """
        super().setup()
        if self.reduction > 1 and type(self.position_encoding).rotate is not Position.rotate:
            raise ValueError("position: with reduction > 1 a key stands at no token's place")
        # All heads are convolved with the same kernels, one for each of a head's channels.
        self.conv = None if self.kernel_size is None else GridConv(self.head_dim, self.kernel_size)
        start_small(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        self.channel_scale = nn.Parameter(torch.zeros(self.kv_heads, 1, self.head_dim))
        if self.reduction > 1:
            self.reduce = nn.Conv2d(self.dim, self.dim, self.reduction, stride=self.reduction)
            self.reduce_norm = nn.LayerNorm(self.dim)
        self.key_places = None
        if self.grid is not None:
            height, width = reduced(self.grid, self.reduction)
            places = torch.zeros(self.kv_heads, height * width, self.head_dim)
            self.key_places = nn.Parameter(places)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of all patches; keys, which know their place, and values of those that are left."""
        x, grid = inputs.x, self.grid_of(inputs.x.shape[1])
        fewer = x if self.reduction == 1 else self.reduce_norm(merged(x, self.reduce, grid))
        q, k, v = self.q_proj(x), self.k_proj(fewer), self.v_proj(fewer)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        return q, k if self.key_places is None else k + self.key_places, v

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Reduced keys stand at no token's place, so nothing rotates them."""
        return super().position(q, k, inputs) if self.reduction == 1 else (q, k)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Focused queries and keys, these over their number, so that ε is added to a mean."""
        scale = softplus(self.channel_scale)[None]
        q = (q.relu() + self.eps) / ops.repeated(scale, q.shape[1])
        k = (k.relu() + self.eps) / scale
        return focus(q, self.power), focus(k, self.power) / k.shape[2]

    def recur(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The product from the right, and the neighbours."""
        return super().recur(q, k, v, inputs) + self.near(v, q)

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Weighted values, and the neighbours."""
        return super().aggregate(weights, v, inputs) + self.near(v, weights)

    def near(self, v: Tensor, like: Tensor) -> Tensor | float:
        """The convolution of the values over all patches, whatever they were reduced to."""
        if self.reduction > 1:
            flat = rearrange(v, "b h n d -> b (h d) n")
            flat = interpolate(flat, size=like.shape[2], mode="linear")
            v = rearrange(flat, "b (h d) t -> b h t d", d=self.head_dim)
        return neighbours(self.conv, v, self.grid_of(like.shape[2]), like.shape[1])


def focus(
    x: Float[Tensor, "batch heads tokens width"], power: float
) -> Float[Tensor, "batch heads tokens width"]:
    """f_p of what is not negative: |x| x^p / |x^p|, norms over the channels of all heads."""
    # Over the largest channel first, since x^p may be too small for its precision.
    top = x.amax((1, 3), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    sharp = (x / top) ** power
    norm = vector_norm(sharp, dim=(1, 3), keepdim=True).clamp(min=1.0)  # below 1 where x is 0
    focused: Tensor = sharp * (vector_norm(x, dim=(1, 3), keepdim=True) / norm)
    return focused
