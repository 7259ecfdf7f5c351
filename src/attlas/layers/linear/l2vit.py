"""Enhanced linear attention of L²ViT: a divisor with a floor, and convolutions that concentrate.

    weights_ij = τ_h · q_i₊·k_j₊ / max( Σ_r q_i₊·k_r₊, c )        (x)₊ = max(x, 0)
    a = W_O concat_h weights_h v_h
    y = a + LCM(LN(x + a))        LCM(x) = DWC₂( BN( gelu( DWC₁(x) ) ) )

The floor c keeps training stable where products are small; above it rows sum to the head's learned
temperature τ, which begins at 1/√d. The map is less concentrated than a softmax's; the local
concentration module, two depthwise convolutions over the grid, makes up for it.

Cost: 2·n·d² multiply-adds a head and 2·n·dim·kernel², memory linear in n.
Reduces to no registered mechanism; to linear attention with relu(x) at τ = 1, c → 0 and no module.
Source: "The Linear Attention Resurrection in Vision Transformer" and its authors' program, which has the
floor of 100, the place of the temperature and the initialisation. There the module is a residual branch
of its own behind attention's; it is this layer's here, whose input x stands for the residual stream.
In the whole model layers of this kind take turns with softmax attention in windows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from attlas import ops
from attlas.bases.grid import GridConv, OnGrid, start_small
from attlas.bases.recurrent import RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.network import moving
from attlas.options import option


class Concentration(nn.Module):
    """The local concentration module: convolution, GELU, batch norm, convolution.

    Args:
        dim: channels of every token.
        kernel_size: rows and columns of the convolutions, odd.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv1 = GridConv(dim, kernel_size)
        self.norm = nn.BatchNorm1d(dim)
        self.conv2 = GridConv(dim, kernel_size)
        start_small(self.conv1, self.conv2)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Every token from its neighbours, channel by channel."""
        # A channel's statistics are over the pictures and their tokens.
        y: Tensor = self.conv2(self.norm(gelu(self.conv1(x, grid)).mT).mT, grid)
        return y


@mechanism("l2vit")
class L2ViT(OnGrid, RecurrentAttention):
    """Linear attention with rectified features, a floor, temperatures and a concentration module."""

    supports = replace(OnGrid.supports, cache="state")
    normalized = False

    bias: bool = option("whether the projections have one", default=True)
    floor: float = option("c, the least that divides", default=100.0, above=0)
    kernel_size: int | None = option("side of the module's kernels, odd; None for none", default=7)

    def setup(self) -> None:
        """Projections that begin small, temperatures, the module and its norm."""
        super().setup()
        start_small(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        self.temperature = nn.Parameter(torch.full((self.heads, 1, 1), self.head_dim**-0.5))
        self.concentration = None
        if self.kernel_size is not None:
            self.norm = nn.LayerNorm(self.dim)
            self.concentration = Concentration(self.dim, self.kernel_size)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Rectified queries, times τ over their divisor, and rectified keys."""
        q, k = q.relu(), k.relu()
        return q * (self.temperature / self.total(q, k).clamp(min=self.floor)), k

    def total(
        self, q: Float[Tensor, "b heads queries width"], k: Float[Tensor, "b kv_heads keys width"]
    ) -> Float[Tensor, "b heads queries 1"]:
        """What divides a query's weights, were there no floor; q and k are features."""
        return ops.grouped_product(q, k.sum(2, keepdim=True).mT)

    @moving
    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads joined and projected; then the module, on top of them and the input."""
        found, grid = super().output(heads, inputs), self.grid_of(inputs.x.shape[1])
        if self.concentration is None:
            return found
        y: Tensor = found + self.concentration(self.norm(inputs.x + found), grid)
        return y
