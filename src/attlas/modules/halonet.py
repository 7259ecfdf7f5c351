"""HaloNet: every block of pixels attends to itself and to a halo around it.

The map is cut into blocks of b × b pixels. The queries of a block, at rows and columns (y, x) of the map,
meet the keys (i, j) of the block enlarged by h pixels on each side, a window of (b + 2h)²:

    score  = (q_yx · k_ij + q_yx · R_{i−y} + q_yx · C_{j−x}) / √d        R, C: [2 (b + h) − 1, d]
    out_yx = W_O concat_heads Σ_ij softmax_ij(score) v_ij

R and C are vectors of the distances in rows and in columns, of all heads. Keys outside the image are
hidden; with `mask_padding=False` they are zeros that take part, as in the published model. With a
stride s only every s-th row and column has a query ("attention downsampling"): the map shrinks by s.

The terms of R and C stand as further channels of the queries, whose keys have a 1 at their own row and
column of the window: so all three are one product, of d + 2 (b + 2h) channels, and no score is kept.

Cost: (b + 2h)² keys for each query, linear in the number of pixels.
Reduces to attention inside the blocks at h = 0, and to global attention with relative positions where the
halo covers the image.
Source: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from attlas import ops
from attlas.catalog.registry import mechanism
from attlas.kinds.feature_map import FeatureMap, Map
from attlas.options import option


@mechanism("halonet", aliases=("halo-attention",), example={"heads": 2, "block_size": 4, "halo_size": 1})
class HaloAttention(FeatureMap):
    """Attention of blocks to themselves and a halo."""

    heads: int = option("of queries, keys and values", default=8, at_least=1)
    head_dim: int = option(
        "width of a head; channels / heads unless given", at_least=1,
        factory=lambda module: module._share(),
    )  # fmt: skip
    block_size: int = option("height and width of a block of queries", default=8, at_least=1)
    halo_size: int = option("pixels that a block sees beyond its own, on a side", default=3, at_least=0)
    stride: int = option("rows and columns of each query; the map shrinks by it", default=1, at_least=1)
    mask_padding: bool = option("whether keys outside the image are hidden", default=True)

    def setup(self) -> None:
        """Projections, and a vector for each distance in rows and in columns.

        Raises:
            ValueError: a stride that does not divide the blocks.
        """
        super().setup()
        if self.block_size % self.stride:
            raise ValueError(f"stride must divide block_size={self.block_size}, got {self.stride}")
        width, distances = self.heads * self.head_dim, 2 * (self.block_size + self.halo_size) - 1
        self.window = self.block_size + 2 * self.halo_size
        self.q_proj = nn.Linear(self.channels, width, bias=False)
        self.k_proj = nn.Linear(self.channels, width, bias=False)
        self.v_proj = nn.Linear(self.channels, width, bias=False)
        self.o_proj = nn.Linear(width, self.channels)
        self.rel_height = nn.Parameter(torch.randn(distances, self.head_dim) * self.head_dim**-0.5)
        self.rel_width = nn.Parameter(torch.randn(distances, self.head_dim) * self.head_dim**-0.5)

    def _share(self) -> int:
        if self.channels % self.heads:
            raise ValueError(
                f"heads must divide channels={self.channels} unless head_dim is given, got {self.heads}"
            )
        return self.channels // self.heads

    def mix(
        self, x: Map, previous: Sequence[Tensor] = ()
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Attention in all blocks at once."""
        batch, _, height, width = x.shape
        size, step = self.block_size, self.stride
        below, right = -height % size, -width % size  # which completes the last blocks
        pixels = pad(x, (0, right, 0, below)).permute(0, 2, 3, 1)
        q = rearrange(
            self.q_proj(pixels[:, ::step, ::step]), "n (r y) (c x) (h d) -> (n r c) h y x d",
            y=size // step, x=size // step, h=self.heads,
        )  # fmt: skip
        k, v = self.windows(self.k_proj(pixels)), self.windows(self.v_proj(pixels))
        inside = self.inside(height, width, x.device) if self.mask_padding else None
        out = ops.attend(
            torch.cat([q, *self.distances(q)], dim=-1).flatten(2, 3), self.with_places(k), v,
            mask=None if inside is None else inside.repeat(batch, 1)[:, None, None],
            scale=self.head_dim**-0.5,
        )  # fmt: skip
        joined = rearrange(
            out, "(n r c) h (y x) d -> n (r y) (c x) (h d)",
            r=(height + below) // size, c=(width + right) // size, y=size // step,
        )  # fmt: skip
        y: Tensor = self.o_proj(joined[:, : -(-height // step), : -(-width // step)])
        return y.permute(0, 3, 1, 2)

    def windows(
        self, pixels: Float[Tensor, "batch height width joined"]
    ) -> Float[Tensor, "blocks heads window_pixels head_dim"]:
        """The pixels of every block and of its halo, zeros outside the image."""
        around = pad(pixels, (0, 0, *[self.halo_size] * 4))
        each = around.unfold(1, self.window, self.block_size).unfold(2, self.window, self.block_size)
        return rearrange(each, "n r c (h d) i j -> (n r c) h (i j) d", h=self.heads)

    def distances(
        self, q: Float[Tensor, "blocks heads rows columns head_dim"]
    ) -> tuple[Float[Tensor, "blocks heads rows columns window"], ...]:
        """Of each query, what it adds to the scores of every row and of every column of its window."""
        keys = torch.arange(self.window, device=q.device)
        queries = torch.arange(0, self.block_size, self.stride, device=q.device)
        number = keys - queries[:, None] + self.block_size - 1  # of the distance, in the tables
        return (
            torch.einsum("bhyxd,yid->bhyxi", q, self.rel_height[number].to(q.dtype)),
            torch.einsum("bhyxd,xjd->bhyxj", q, self.rel_width[number].to(q.dtype)),
        )

    def with_places(
        self, k: Float[Tensor, "blocks heads window_pixels head_dim"]
    ) -> Float[Tensor, "blocks heads window_pixels more"]:
        """Keys, and a 1 at their row and at their column."""
        unit = one_hot(torch.arange(self.window, device=k.device), self.window).to(k.dtype)
        rows, columns = unit.repeat_interleave(self.window, 0), unit.repeat(self.window, 1)
        return torch.cat([k, torch.cat([rows, columns], 1).expand(*k.shape[:3], -1)], dim=-1)

    def inside(
        self, height: int, width: int, device: torch.device
    ) -> Bool[Tensor, "blocks window_pixels"]:
        """Which pixels of every window lie in the image."""
        rows, columns = map(partial(self._along, device=device), (height, width))
        both = rows[:, None, :, None] & columns[:, None, :]
        return both.flatten(2).flatten(0, 1)

    def _along(self, length: int, device: torch.device) -> Bool[Tensor, "blocks window"]:
        first = torch.arange(0, length, self.block_size, device=device) - self.halo_size
        at = first[:, None] + torch.arange(self.window, device=device)
        return (at >= 0) & (at < length)
