"""Blocks of tokens compressed to one vector each, by a network or as their mean.

    φ(x_{id}, …, x_{id+l−1}) = W₂ ReLU(W₁ [x_{id} + e_0 | … | x_{id+l−1} + e_{l−1}] + b₁) + b₂

e is trained for each head and place in a block, and 0 at first; the network is that of all heads.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from attlas.inputs import Inputs
from attlas.storage.rows import left_aligned


class Compression(nn.Module):
    """φ for heads of some width.

    Args:
        heads: how many.
        width: of what is compressed.
        block: l, tokens of a block.
        stride: d, tokens between the beginnings of blocks.
        hidden: width inside the network; None: the mean is taken.
    """

    def __init__(self, heads: int, width: int, block: int, stride: int, hidden: int | None) -> None:
        super().__init__()
        self.block, self.stride, self.trained = block, stride, hidden is not None
        if hidden is not None:
            self.places = nn.Parameter(torch.zeros(heads, block, width))
            self.enter, self.leave = nn.Linear(block * width, hidden), nn.Linear(hidden, width)

    def forward(
        self, x: Float[Tensor, "batch heads tokens width"]
    ) -> Float[Tensor, "batch heads blocks width"]:
        """One vector for each block that is whole."""
        if x.shape[2] < self.block:
            return x[:, :, :0]
        each = x.unfold(2, self.block, self.stride).mT
        if not self.trained:
            return each.mean(3)
        found: Tensor = self.leave(self.enter((each + self.places[:, None]).flatten(3)).relu())
        return found


def aligned(
    x: Shaped[Tensor, "batch heads tokens width"], inputs: Inputs
) -> Shaped[Tensor, "batch heads tokens width"]:
    """What a row's last tokens have, in their order, with zeros behind them where there is padding."""
    if inputs.valid is None:
        return x
    valid = inputs.valid[:, -x.shape[2] :]
    return left_aligned(x.masked_fill(~valid[:, None, :, None], 0), valid)
