"""Mixture of block attention (MoBA): each query attends to its own block and the best earlier ones.

    k̄_n     = mean of the keys of block n                           (rotated, as they are multiplied)
    g_tn    = q_t · k̄_n for n < b_t,   +∞ for n = b_t,   −∞ for n > b_t        b_t = ⌊t / block⌋
    read(t) = the `topk` blocks of largest g_t, the own block among them
    out_t   = softmax({q_t·k_j/√d : j ≤ t, j in a block that is read}) · v

Each query head chooses for itself. `full` may be set at any time: the weights are those of softmax
attention, which training may begin or end with. Blocks are cut by the order of a row's valid tokens.

Cost: n²/block products for the choice and n · topk · block pairs instead of n²/2.
Reduces to causal softmax attention where `topk` is the number of blocks.
Source: "MoBA: Mixture of Block Attention for Long-Context LLMs".
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas import ops
from attlas.attention import Attention
from attlas.bases.blocks import Blocks
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.options import option
from attlas.supports import Supports
from attlas.tracing import stretches

#: Queries whose gates are held at once; on a GPU, where each step is a dozen launches, so many gates.
ROWS, GATES = 256, 1 << 25


@mechanism(
    "moba", reduces_to=Reduction("softmax", {"topk": 64, "block": 4}), example={"block": 4, "topk": 2}
)
class MoBA(Attention):
    """Causal attention to the blocks of keys that each query chooses."""

    supports: ClassVar[Supports] = Supports(
        bidirectional=False, cross=False, masks="padding", counts=True,
        one_length="the blocks that are there hang on the length",
    )  # fmt: skip
    #: Blocks of a cache's room would be read as blocks of keys.
    roomy: ClassVar[bool] = False

    block: int = option("tokens of a block", default=512, at_least=1)
    topk: int = option("blocks that a query reads, its own among them", default=3, at_least=1)
    full: bool = option("attend to all blocks, as training may begin", default=False)

    @staticmethod
    def gate(
        q: Float[Tensor, "batch heads queries dim"],
        means: Float[Tensor, "batch kv_heads blocks dim"],
        own: Int[Tensor, "rows queries"],
    ) -> Float[Tensor, "batch heads queries blocks"]:
        """How well each block fits each query: ∞ for its own, −∞ for later ones."""
        scores = ops.grouped_product(ops.wide(q), ops.wide(means).mT)  # equal ones are few then
        block, own = torch.arange(scores.shape[-1], device=q.device), own[:, None, :, None]
        return scores.masked_fill(block > own, -torch.inf).masked_fill(block == own, torch.inf)

    @torch.no_grad()
    def choose(
        self, q: Tensor, k: Tensor, blocks: Blocks
    ) -> Int[Tensor, "batch heads queries topk"]:
        """The blocks that each query reads, ascending, −1 behind the last."""
        means = blocks.means(k)
        gates = GATES // max(1, q.shape[0] * q.shape[1] * blocks.count) if q.is_cuda else 0
        return torch.cat([
            blocks.best(self.gate(q[:, :, rows], means, blocks.of_queries[:, rows]), self.topk)
            for rows in stretches(q.shape[2], max(ROWS, gates))
        ], dim=2)  # fmt: skip

    def mask(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Mask | Bool[Tensor, "b h queries keys"] | None:
        """The pairs of the chosen blocks."""
        base = super().mask(q, k, inputs)
        if self.full:
            return base
        blocks = Blocks.of(inputs, q, k, self.block)
        return blocks.seen(self.choose(q, k, blocks), base)
