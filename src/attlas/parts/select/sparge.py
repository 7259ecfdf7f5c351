"""SpargeAttention for a prompt: each block of queries reads the blocks of keys that hold its means' mass.

    pages(i) = the largest softmax_j(mean(Q_i) · mean(K_j − k̄) · scale) that sum up to `mass`,
               and what no mean stands for: see `attlas.ops.sparge_attention`

Skips of single products and scores in 8 bits are the op's alone. A change of scores by the model (ALiBi,
soft caps) is not part of the choice. Decoding reads everything.

Cost: (n/b)² products of means, and the blocks of the map. Reduces to full attention with mass 1.

Source: "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from attlas import masks, ops
from attlas.attach.thinned import Text, Thinned
from attlas.catalog.registry import mechanism
from attlas.masks import Mask
from attlas.ops.exact import wide
from attlas.ops.sparge_attention import block_map
from attlas.options import option


@mechanism(
    "sparge-prefill", paper="sparge-attention",
    example={"mass": 0.5, "similar": -1.0, "q_block": 4, "k_block": 2},
)  # fmt: skip
class SpargePrefill(Thinned):
    """Let blocks of queries read the blocks of keys that hold most of their means' softmax."""

    everything: ClassVar[dict[str, Any]] = {"mass": 1.0}
    comparable: ClassVar[tuple[str, ...]] = ("(mass=0.94, similar=-1.0)", "(mass=0.85, similar=-1.0)")

    mass: float = option("of the means' softmax that is read", default=0.98, above=0, at_most=1)
    similar: float = option(
        "mean cosine above which a mean stands for its block", default=0.6, at_least=-1, at_most=1
    )
    sink: bool = option("read the first block always", default=False)
    q_block: int = option("tokens of a block of queries", default=128, at_least=1)
    k_block: int = option("tokens of a block of keys", default=64, at_least=1)

    @torch.no_grad()
    def pattern(self, text: Text) -> Mask:
        """The blocks of the map."""
        smooth = wide(text.k) - wide(text.k).mean(2, keepdim=True)
        chosen = block_map(
            text.q, smooth, mask=masks.causal, scale=text.scale, q_offset=text.offset, mass=self.mass,
            share=None, similar=self.similar, sink=self.sink, q_block=self.q_block,
            k_block=self.k_block,
        )  # fmt: skip
        return masks.Pages(ops.as_lists(chosen), (self.q_block, self.k_block), first=text.offset)
