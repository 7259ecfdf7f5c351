"""What attention over a picture shares: its grid, convolutions over it, rotations by row and column.

Tokens are a picture's patches, row by row: [batch, height · width, dim]. No mechanism of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import elu

from attlas import ops
from attlas.attention import Attention
from attlas.bases.recurrent import RecurrentAttention
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.positions import RoPE


def grid_of(tokens: int, grid: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of a picture: as given, else the square of the tokens, else one row.

    Raises:
        ValueError: a grid of another number of tokens.
    """
    if grid is not None:
        if grid[0] * grid[1] != tokens:
            raise ValueError(f"grid={grid} takes {grid[0] * grid[1]} tokens, got {tokens}")
        return grid
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


def start_small(*modules: nn.Linear | nn.Conv2d) -> None:
    """Weights from a normal distribution of deviation 0.02, biases 0, as vision transformers begin."""
    for module in modules:
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class OnGrid(Attention):
    """Attention whose tokens are a picture, all of which sees all of it.

    Args:
        grid: height and width; the square of the tokens, or one row if they make none, unless given.

    Raises:
        ValueError: a grid that is no height and width, or of another number of tokens.
    """

    has_causal_form = False
    has_cross_form = False
    takes_masks = "none"

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, grid: Sequence[int] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        if grid is not None:
            if len(grid) != 2:
                raise ValueError(f"grid must be (height, width), got {grid}")
            grid = (at_least_one("grid", grid[0]), at_least_one("grid", grid[1]))
        self.grid: tuple[int, int] | None = grid
        super().__init__(dim, heads, *args, **options)

    def grid_of(self, tokens: int) -> tuple[int, int]:
        """Height and width of so many tokens."""
        return grid_of(tokens, self.grid)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a picture of the right size."""
        self.grid_of(inputs.x.shape[1])
        return super().project(inputs)


class LinearOnGrid(OnGrid, RecurrentAttention):
    """Linear attention plus a depthwise convolution of the values: heads + conv(v).

    Args:
        kernel_size: rows and columns of the convolution, odd; None for none.
    """

    #: Whether all heads are convolved with the same kernels, one for each of a head's channels.
    shares_kernels: ClassVar[bool] = False

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, kernel_size: int | None = 5, bias: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        self.kernel_size = kernel_size
        super().__init__(dim, heads, *args, bias=self.bias, **options)

    def make_projections(self) -> None:
        """Projections and the convolution."""
        super().make_projections()
        heads = 1 if self.shares_kernels else self.kv_heads
        self.conv = (
            None if self.kernel_size is None else GridConv(heads * self.head_dim, self.kernel_size)
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Tensor:
        """The product from the right, and the neighbours."""
        if self.training and self.dropout > 0:  # which falls on the weights
            return self.aggregate(self.weigh(q, k, inputs), v, inputs)
        return self.with_neighbours(super().attend(q, k, v, inputs), v)

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Weighted values, and the neighbours."""
        return self.with_neighbours(super().aggregate(weights, v, inputs), v)

    def with_neighbours(
        self,
        heads: Float[Tensor, "b heads tokens width"],
        v: Float[Tensor, "b kv_heads tokens width"],
    ) -> Float[Tensor, "b heads tokens width"]:
        """Heads plus the convolution of the values."""
        if self.conv is None:
            return heads
        grid = self.grid_of(v.shape[2])
        if self.shares_kernels:
            near = self.conv(v.flatten(0, 1), grid).unflatten(0, v.shape[:2])
        else:
            near = self.split_heads(self.conv(rearrange(v, "b h t d -> b t (h d)"), grid))
        return heads + ops.repeated(near, heads.shape[1])


class GatedOnGrid(LinearOnGrid):
    """A linear layer whose features are rotated by row and column, and whose outputs have a gate.

    Divisors are told by features that are not rotated, so `features` divides the queries itself.

    Args:
        rotary: whether features are rotated; the first half of a head's channels by the row, the
            second by the column.
        eps: added to what divides.

    Raises:
        ValueError: heads whose halves are not pairs of channels.
    """

    has_own_position = True
    normalized = False

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, rotary: bool = True, eps: float = 1e-6,
        **options: Any,
    ) -> None:  # fmt: skip
        self.rotary = rotary
        super().__init__(dim, heads, *args, **options)
        self.eps = eps

    def make_projections(self) -> None:
        """Projections, a convolution that begins small, the gate and the angles."""
        super().make_projections()
        if self.conv is not None:
            start_small(self.conv)
        self.gate_proj = nn.Linear(self.dim, self.heads * self.head_dim, bias=self.bias)
        if not self.rotary:
            return
        if self.head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 with rotary, got {self.head_dim}")
        self.rope = RoPE(self.head_dim // 2, interleaved=True)
        self.rope.frequencies = 10000.0 ** -torch.linspace(0, 1, self.head_dim // 4)

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

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads times a linear gate, projected."""
        return super().output(heads * self.split_heads(self.gate_proj(inputs.x)), inputs)
