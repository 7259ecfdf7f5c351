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

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import interpolate, softplus

from attlas.bases.grid import LinearOnGrid, start_small
from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.positions import Position


@mechanism("focused-linear-attention", aliases=("flatten", "focused-linear"))
class FocusedLinear(LinearOnGrid):
    """Linear attention with the focusing map and a depthwise convolution of the values.

    Args:
        power: p of the focusing map.
        reduction: side of the square of patches that one key stands for.
        eps: added to the features and to the mean product that divides.
        kernel_size: rows and columns of the convolution, odd; None for none.

    Raises:
        ValueError: a power below 1, an ε that is not above 0, a reduction that does not divide the
            grid, or rotated keys that are reduced.
    """

    shares_kernels = True

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, power: float = 3.0, reduction: int = 1,
        eps: float = 1e-6, **options: Any,
    ) -> None:  # fmt: skip
        if power < 1:
            raise ValueError(f"power must be at least 1, got {power}")
        if eps <= 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        self.power, self.reduction = power, at_least_one("reduction", reduction)
        super().__init__(dim, heads, *args, **options)
        self.eps = eps
        if reduction > 1 and type(self.position_encoding).rotate is not Position.rotate:
            raise ValueError("position: with reduction > 1 a key stands at no token's place")

    def make_projections(self) -> None:
        """Projections, the convolution, what reduces the keys, their places, and the channels' scale."""
        super().make_projections()
        start_small(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        self.channel_scale = nn.Parameter(torch.zeros(self.kv_heads, 1, self.head_dim))
        if self.reduction > 1:
            self.reduce = nn.Conv2d(self.dim, self.dim, self.reduction, stride=self.reduction)
            self.reduce_norm = nn.LayerNorm(self.dim)
        self.key_places = None
        if self.grid is not None:
            height, width = self._reduced(self.grid)
            places = torch.zeros(self.kv_heads, height * width, self.head_dim)
            self.key_places = nn.Parameter(places)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of all patches; keys, which know their place, and values of those that are left."""
        height, width = self.grid_of(inputs.x.shape[1])
        fewer = self._fewer(inputs.x, height, width)
        q, k, v = self.q_proj(inputs.x), self.k_proj(fewer), self.v_proj(fewer)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        return q, k if self.key_places is None else k + self.key_places, v

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Reduced keys stand at no token's place, so nothing turns them."""
        return super().position(q, k, inputs) if self.reduction == 1 else (q, k)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Focused queries and keys, these over their number, so that ε is added to a mean."""
        scale = softplus(self.channel_scale)[None]
        q = (q.relu() + self.eps) / ops.repeated(scale, q.shape[1])
        k = (k.relu() + self.eps) / scale
        return focus(q, self.power), focus(k, self.power) / k.shape[2]

    def with_neighbours(self, heads: Tensor, v: Tensor) -> Tensor:
        """The convolution is over all patches, whatever the values were reduced to."""
        if self.reduction > 1 and self.conv is not None:
            flat = rearrange(v, "b h n d -> b (h d) n")
            flat = interpolate(flat, size=heads.shape[2], mode="linear")
            v = rearrange(flat, "b (h d) t -> b h t d", d=self.head_dim)
        return super().with_neighbours(heads, v)

    def _fewer(self, x: Tensor, height: int, width: int) -> Tensor:
        if self.reduction == 1:
            return x
        self._reduced((height, width))
        picture = rearrange(x, "b (h w) c -> b c h w", h=height, w=width)
        fewer: Tensor = self.reduce_norm(rearrange(self.reduce(picture), "b c h w -> b (h w) c"))
        return fewer

    def _reduced(self, grid: tuple[int, int]) -> tuple[int, int]:
        if grid[0] % self.reduction or grid[1] % self.reduction:
            raise ValueError(f"reduction={self.reduction} must divide the grid, got {grid}")
        return grid[0] // self.reduction, grid[1] // self.reduction


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
