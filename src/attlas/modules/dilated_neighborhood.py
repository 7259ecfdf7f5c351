"""Dilated neighbourhood attention (DiNA): each position attends to its nearest ones, `dilation` apart.

    q, k, v = the map's channels projected, in heads of width d_h
    out = W_o concat over heads of softmax(q_i kᵀ / √d_h + B[offset]) v over i's neighbours

Along each axis positions whose index is the same modulo the dilation are a sub-grid of their own, in
which i sees the `window` positions nearest to it (windows are shifted inwards at borders). B is trained
for each head and offset, 2 · window − 1 of them along each axis, in steps of the dilation.

Blocks with dilation 1 (local) and blocks with the largest that fits (sparse and global) alternate in
the paper's network, `DiNAT`: a stack of them sees exponentially far.

On a map too small for the window, the window is what fits; the published layer pads the map with
zeros, which are attended to.

Cost: 4 C² parameters and O(H W · window² · C). Reduces to neighbourhood attention at dilation 1, to
self-attention with a bias of offsets where the window covers the map.
Source: "Dilated Neighborhood Attention Transformer".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu

from attlas.catalog.registry import mechanism
from attlas.kinds.feature_map import FeatureMap, Map
from attlas.ops.neighborhood import neighborhood
from attlas.options import option


@mechanism("dilated-neighborhood-attention", aliases=("dina",), example={"heads": 2, "window": 3})
class DilatedNeighborhood(FeatureMap):
    """Attention of positions to a dilated neighbourhood."""

    heads: int = option("of the attention", default=2, at_least=1)
    window: int | tuple[int, int] = option(
        "positions seen along each axis, or along height and width", default=7, at_least=1
    )
    dilation: int | tuple[int, int] = option(
        "positions from one seen to the next, or along height and width", default=1, at_least=1
    )
    bias: bool = option("whether scores have a trained bias of offsets", default=True)
    qkv_bias: bool = option("whether the projections of q, k and v have one", default=True)
    scale: float | None = option("of the products; 1/√(channels / heads) unless given", default=None)
    attn_drop: float = option("share of weights dropped", default=0.0, at_least=0, below=1)
    proj_drop: float = option("share of outputs dropped", default=0.0, at_least=0, below=1)

    def setup(self) -> None:
        """Make the projections and the bias."""
        super().setup()
        if self.channels % self.heads:
            raise ValueError(f"heads must divide channels={self.channels}, got {self.heads}")
        self.qkv = nn.Linear(self.channels, 3 * self.channels, bias=self.qkv_bias)
        self.proj = nn.Linear(self.channels, self.channels)
        self.rpb = None
        if self.bias:
            offsets = (2 * size - 1 for size in _pair(self.window))
            self.rpb = nn.Parameter(torch.empty(self.heads, *offsets))
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def mix(self, x: Map, previous: Sequence[Tensor] = ()) -> Map:
        """The map, attended to."""
        batch, channels, height, width = x.shape
        tokens = self.qkv(x.flatten(2).mT)
        sizes = (batch, height * width, 3, self.heads, channels // self.heads)
        q, k, v = tokens.view(sizes).permute(2, 0, 3, 1, 4)
        heads = self.attend(q, k, v, (height, width))
        y = self.proj(heads.transpose(1, 2).flatten(2))
        return dropout(y, self.proj_drop, self.training).mT.reshape(x.shape)

    def attend(
        self, q: Float[Tensor, "batch heads tokens width"], k: Float[Tensor, "batch heads tokens width"],
        v: Float[Tensor, "batch heads tokens width"], shape: tuple[int, int],
    ) -> Float[Tensor, "batch heads tokens width"]:  # fmt: skip
        """Heads of the positions of a map of `shape`, row by row, from their neighbours."""
        dilation = tuple(min(d, n) for d, n in zip(_pair(self.dilation), shape, strict=True))
        fits = (n // d for n, d in zip(shape, dilation, strict=True))
        window = tuple(min(w, n) for w, n in zip(_pair(self.window), fits, strict=True))
        bias: Tensor | None = self.rpb
        if bias is not None:
            for axis, (full, own) in enumerate(zip(_pair(self.window), window, strict=True), start=1):
                bias = bias.narrow(axis, full - own, 2 * own - 1)
        heads = neighborhood(
            q, k, v, shape=shape, window=window, dilation=dilation, bias=bias, scale=self.scale,
            dropout=self.attn_drop if self.training else 0.0,
        )  # fmt: skip
        assert isinstance(heads, Tensor)
        return heads


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


class DiNAT(nn.Module):
    """The paper's network: levels of transformer blocks, each with half the side of the one before.

    Images are halved twice by convolutions, and once more between levels, where channels double.

    Args:
        dilations: of the blocks of each level, as (1, 8, 1) in the first of the published ones.
        channels: of the images.
        width: channels of the first level.
        heads: of each level.
        classes: what images are told apart as.
        window: positions that a block sees along each axis.
        mlp_ratio: width inside the blocks' two-layer networks.

    Raises:
        ValueError: heads for another number of levels.
    """

    def __init__(
        self, dilations: Sequence[Sequence[int]], *, channels: int = 3, width: int = 64,
        heads: Sequence[int] = (2, 4, 8, 16), classes: int = 1000, window: int = 7,
        mlp_ratio: float = 3.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(heads) != len(dilations):
            raise ValueError(f"heads must tell {len(dilations)} levels' as dilations do, got {heads}")
        halved: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width // 2, **halved), nn.Conv2d(width // 2, width, **halved),
            _Norm(width),
        )  # fmt: skip
        levels: list[nn.Module] = []
        for level, (count, each) in enumerate(zip(heads, dilations, strict=True)):
            wide = width * 2**level
            if level:
                levels += [nn.Conv2d(wide // 2, wide, bias=False, **halved), _Norm(wide)]
            levels += [_Block(wide, count, window, dilation, mlp_ratio) for dilation in each]
        self.levels = nn.Sequential(*levels)
        self.norm, self.head = _Norm(wide), nn.Linear(wide, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Map) -> Float[Tensor, "batch classes"]:
        """Logits of images."""
        y: Tensor = self.head(self.norm(self.levels(self.stem(x))).mean((2, 3)))
        return y


class _Norm(nn.LayerNorm):
    """Every position's channels, normed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Block(nn.Module):
    def __init__(
        self, width: int, heads: int, window: int, dilation: int, mlp_ratio: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = _Norm(width), nn.LayerNorm(width)
        self.attn = DilatedNeighborhood(width, heads=heads, window=window, dilation=dilation)
        self.fc1, self.fc2 = (
            nn.Linear(*sides)
            for sides in ((width, int(width * mlp_ratio)), (int(width * mlp_ratio), width))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        mixed: Tensor = self.fc2(gelu(self.fc1(self.norm2(x.movedim(1, -1)))))
        return x + mixed.movedim(-1, 1)
