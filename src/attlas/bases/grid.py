"""What attention over a picture shares: its grid, convolutions over it, rotations by row and column.

Tokens are a picture's patches, row by row: [batch, height · width, dim]. No mechanism of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import elu

from attlas import ops
from attlas.bases.recurrent import RecurrentAttention
from attlas.inputs import Inputs
from attlas.options import Configured, option
from attlas.positions import RoPE
from attlas.supports import Supports


def grid_of(tokens: int, grid: Sequence[int] | None = None) -> tuple[int, int]:
    """Height and width of a picture: as given, else the square of the tokens, else one row.

    Raises:
        ValueError: a grid of another number of tokens.
    """
    if grid is not None:
        height, width = grid
        if height * width != tokens:
            raise ValueError(f"grid={(height, width)} takes {height * width} tokens, got {tokens}")
        return height, width
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else (1, tokens)


class GridConv(nn.Conv2d):
    """A convolution over the grid, every channel by itself, that keeps the grid's size.

    Args:
        channels: of every token.
        kernel_size: an odd number of rows and columns.

    Raises:
        ValueError: an even kernel size, or none.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "rows tokens channels"], grid: tuple[int, int]
    ) -> Float[Tensor, "rows tokens channels"]:
        """Each token of the picture from its neighbours."""
        picture = rearrange(x, "b (h w) c -> b c h w", h=grid[0], w=grid[1])
        return rearrange(super().forward(picture), "b c h w -> b (h w) c")

    def of_values(
        self, v: Float[Tensor, "b heads tokens width"], grid: tuple[int, int]
    ) -> Float[Tensor, "b heads tokens width"]:
        """All heads' values convolved: by the same kernels if the convolution has as many channels as
        one head, else by kernels of each head's own."""
        if self.in_channels == v.shape[-1]:
            alike = self.forward(rearrange(v, "b h t d -> (b h) t d"), grid)
            return rearrange(alike, "(b h) t d -> b h t d", h=v.shape[1])
        joined = self.forward(rearrange(v, "b h t d -> b t (h d)"), grid)
        return rearrange(joined, "b t (h d) -> b h t d", h=v.shape[1])


def start_small(*modules: nn.Linear | nn.Conv2d) -> None:
    """Weights from a normal distribution of deviation 0.02, biases 0, as vision transformers begin."""
    for module in modules:
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def reduced(grid: Sequence[int], by: int) -> tuple[int, int]:
    """Height and width of a picture whose squares of `by` × `by` patches are made one.

    Raises:
        ValueError: a side that does not divide them.
    """
    height, width = grid
    if height % by or width % by:
        raise ValueError(f"reduction={by} must divide the grid, got {(height, width)}")
    return height // by, width // by


def merged(
    x: Float[Tensor, "batch tokens dim"], conv: nn.Conv2d, grid: tuple[int, int]
) -> Float[Tensor, "batch fewer dim"]:
    """The tokens that a convolution makes of the squares of patches that it steps over."""
    reduced(grid, conv.stride[0])
    picture = rearrange(x, "b (h w) c -> b c h w", h=grid[0], w=grid[1])
    fewer: Tensor = conv(picture)
    return rearrange(fewer, "b c h w -> b (h w) c")


class OnGrid(Configured):
    """What is mixed into a layer whose tokens are a picture, all of which sees all of it."""

    supports: ClassVar[Supports] = Supports(
        causal=False, cross=False, masks="none", counts=True,
        one_length="its tokens are a picture, whose height and width follow from their number",
    )  # fmt: skip

    grid: Sequence[int] | None = option(
        "height and width; the square of the tokens, or one row if they make none, unless given",
        default=None, at_least=1,
    )  # fmt: skip

    def setup(self) -> None:
        """Refuse a grid that is no height and width."""
        super().setup()
        if self.grid is not None and len(self.grid) != 2:
            raise ValueError(f"grid must be (height, width), got {self.grid}")

    def grid_of(self, tokens: int) -> tuple[int, int]:
        """Height and width of so many tokens."""
        return grid_of(tokens, self.grid)


def neighbours(
    conv: GridConv | None, v: Float[Tensor, "b kv_heads tokens width"], grid: tuple[int, int],
    heads: int,
) -> Float[Tensor, "b heads tokens width"] | float:  # fmt: skip
    """What a convolution of the values adds to the heads' outputs; 0 without one."""
    return 0.0 if conv is None else ops.repeated(conv.of_values(v, grid), heads)


class GatedOnGrid(OnGrid, RecurrentAttention):
    """Linear attention with rotated features, a convolution of the values, and gated outputs.

    Divisors are told by features that are not rotated, so a subclass's `features` divides the queries
    itself.
    """

    supports = replace(OnGrid.supports, position=False, cache="state")
    changes = ("output",)
    beyond = ("output: in the published layers a gate multiplies the heads' outputs",)
    normalized = False

    bias: bool = option("whether the projections have one", default=True)
    kernel_size: int | None = option(
        "rows and columns of the convolution of the values, odd; None for none", default=5
    )
    rotary: bool = option(
        "whether features are rotated, half of a head's channels by the row, half by the column",
        default=True,
    )
    eps: float = option("added to what divides", default=1e-6)

    def setup(self) -> None:
        """A convolution that begins small, the gate and the angles.

        Raises:
            ValueError: heads whose halves are not pairs of channels.
        """
        super().setup()
        self.conv = None
        if self.kernel_size is not None:
            self.conv = GridConv(self.kv_heads * self.head_dim, self.kernel_size)
            start_small(self.conv)
        self.gate_proj = nn.Linear(self.dim, self.heads * self.head_dim, bias=self.bias)
        if not self.rotary:
            return
        if self.head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 with rotary, got {self.head_dim}")
        self.rope = RoPE(self.head_dim // 2, interleaved=True)
        self.rope.hold("frequencies", self._made)

    def _made(self) -> Tensor:
        """Frequencies from 1 to 1/10000, both ends among them."""
        return 10000.0 ** -torch.linspace(0, 1, self.head_dim // 4, dtype=torch.float32)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """elu + 1, neither divided nor rotated."""
        return elu(q) + 1, elu(k) + 1

    def mean_product(
        self, q: Float[Tensor, "b heads queries width"], k: Float[Tensor, "b kv_heads keys width"]
    ) -> Float[Tensor, "b heads queries 1"]:
        """What a query's products with all keys are on average."""
        return ops.grouped_product(q, k.mean(2, keepdim=True).mT)

    def rotated(
        self, x: Float[Tensor, "b heads tokens width"]
    ) -> Float[Tensor, "b heads tokens width"]:
        """Features rotated by their tokens' rows and columns, every `head_dim` channels alike."""
        if not self.rotary:
            return x
        width = self.grid_of(x.shape[2])[1]
        at = torch.arange(x.shape[2], device=x.device)
        rows, columns = rearrange(
            x, "b h t (n two d) -> two b (h n) t d", two=2, d=self.head_dim // 2
        )
        rotated = torch.stack(
            [self.rope.rotate(rows, at // width), self.rope.rotate(columns, at % width)]
        )
        return rearrange(rotated, "two b (h n) t d -> b h t (n two d)", h=x.shape[1])

    def recur(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The product from the right, and the neighbours."""
        return super().recur(q, k, v, inputs) + self.near(v, q.shape[1])

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Weighted values, and the neighbours."""
        return super().aggregate(weights, v, inputs) + self.near(v, weights.shape[1])

    def near(self, v: Tensor, heads: int) -> Tensor | float:
        """What neighbouring values add to each of the query heads."""
        return neighbours(self.conv, v, self.grid_of(v.shape[2]), heads)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads times a linear gate, projected."""
        return super().output(heads * self.split_heads(self.gate_proj(inputs.x)), inputs)
