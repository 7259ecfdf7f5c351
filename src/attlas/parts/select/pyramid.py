"""Pyramid sparse attention for a prompt: unimportant blocks of keys are read as means of 2, 4 or 8.

    levels(i, j) ∈ {0, 1, 2, 4, 8}  by the rank of block j for the queries of block i
    out          = softmax over all kept blocks of [q · k̃ · scale + log l] ṽ

See `attlas.ops.pyramid_sparse_attention`. Blocks that the future cuts, and the first, are read whole.
Which tokens of a block are drawn to rank it hangs on `seed` and the layer. Decoding reads everything.

Cost: Σ 1/l of the pairs of blocks; the ranking n²/16 products. Reduces to full attention where the first
level ends at 1.

Source: "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation".
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attlas import masks
from attlas.attach.thinned import Text, Thinned
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.ops.delta import beside_sinks
from attlas.ops.pyramid_sparse_attention import (
    ENDS,
    LEVELS,
    SIMILAR,
    chosen_levels,
    pyramid_sparse_attention,
)
from attlas.options import option


@mechanism(
    "pyramid-prefill", paper="pyramid-sparse-attention",
    example={"ends": (0.4, 0.5, 0.6, 0.8), "q_block": 8, "k_block": 8},
)  # fmt: skip
class PyramidPrefill(Thinned):
    """Let blocks of queries read blocks of keys whole, averaged, or not at all."""

    everything: ClassVar[dict[str, Any]] = {"ends": (1.0, 1.0, 1.0, 1.0)}
    changes: ClassVar[tuple[str, ...]] = ("mask", "aggregate")
    comparable: ClassVar[tuple[str, ...]] = ("(ends=(0.2, 0.3, 0.4, 0.5), by='quota')",
                                             "(ends=(0.05, 0.1, 0.2, 0.4), by='quota')")  # fmt: skip

    ends: tuple[float, ...] = option(
        "where levels 1, 2, 4 and 8 end, as shares of the ranks or of all importance",
        default=tuple(ENDS[level] for level in LEVELS), at_least=0, at_most=1,
    )  # fmt: skip
    by: Literal["quota", "threshold"] = option("ranks, or importance", default="threshold")
    least: float = option(
        "share of the ranks that are read whole at least, by threshold", default=0.06, at_least=0,
        at_most=1,
    )  # fmt: skip
    similar: tuple[float, ...] = option(
        "cosines of keys above which means of 2, 4 and 8 are allowed", default=SIMILAR, at_least=-1,
        at_most=1,
    )  # fmt: skip
    q_block: int = option("tokens of a block of queries", default=128, at_least=1)
    k_block: int = option("tokens of a block of keys, a multiple of 8", default=128, at_least=8)
    seed: int = option("decides which tokens of a block are drawn", default=0)

    def setup(self) -> None:
        """Refuse options that do not go together.

        Raises:
            ValueError: ends or similar of another number, blocks of keys that 8 does not divide.
        """
        super().setup()
        for name, got, many in (("ends", self.ends, 4), ("similar", self.similar, 3)):
            if len(got) != many:
                raise UserError(f"{name} takes {many} numbers, got {got}")
        if self.k_block % LEVELS[-1]:
            raise UserError(f"k_block takes a multiple of {LEVELS[-1]}, got {self.k_block}")

    def attended(self, text: Text) -> Float[Tensor, "batch heads queries v_dim"]:
        """Attention to keys at several resolutions.

        Raises:
            ValueError: the model or another part changes scores, or hides more than later tokens.
        """
        if text.score_mod is not None or text.seen is not None:
            raise UserError("pyramid-prefill reads means, and honours no changed scores or other masks")
        q_block, k_block = self.q_block, self.k_block
        low, middle, high = self.similar
        levels = chosen_levels(
            text.q, text.k, mask=masks.causal, scale=text.scale, q_offset=text.offset,
            ends=dict(zip(LEVELS, self.ends, strict=True)), by=self.by, least=self.least,
            similar=(low, middle, high), q_block=q_block, k_block=k_block,
            generator=torch.Generator().manual_seed(self.seed + text.layer),
        )  # fmt: skip
        some, _ = masks.grid(
            masks.causal, text.q.shape[2], text.k.shape[2], q_block=q_block, k_block=k_block,
            q_offset=text.offset, device=text.q.device,
        )  # fmt: skip
        share = torch.where(levels > 0, 1 / levels.clamp(min=1), 0.0).sum((-1, -2)).mean(0)
        self.density[text.layer] = share / some.sum()
        out, lse = pyramid_sparse_attention(
            text.q, text.k, text.v, mask=masks.causal, scale=text.scale, levels=levels, q_block=q_block,
            k_block=k_block,
        )  # fmt: skip
        return beside_sinks(out, lse, text.sinks)
