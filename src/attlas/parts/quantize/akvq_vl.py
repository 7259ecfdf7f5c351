"""AKVQ-VL: two bits for most tokens of a vision-language cache, more for those that are attended to.

    H      Walsh–Hadamard matrix / √n, orthonormal:  (q H) · (k H) = q · k,  Σ w (v H) H = Σ w v
    stored codes of k H (a step for each channel over `key_group` tokens) and of v H (a step a token)

| tokens                                                              | bits          |
|---------------------------------------------------------------------|---------------|
| pivots: norms of key or value far from the others'                    | as they are   |
| early layers: text                                                    | `salient_bits` |
| other layers: the share `salient` that the last queries attend to most | `salient_bits` |
| the others, among them most image tokens                              | `bits`        |

H spreads a channel that is large in all tokens, or a number that is large in one, over all channels.
A pivot is a token with |ln‖x‖ − median| > `pivot_cut` · (median of these distances), by key head, for
its key x or its value. Codes are rotated back as they are read. Cost: the last queries' attention once
for every block encoded, and dim² multiplications a token read. Reduces to full attention at bits=16.

Established are the rotation, the two bits and who is salient (text in early layers, pivots in all);
how pivots are found, the number of early layers and the bits of attended tokens are our reading.

Source: "AKVQ-VL: Attention-Aware KV Cache Adaptive 2-Bit Quantization for Vision-Language Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.attach.call import Call
from attlas.cache.asked import remember
from attlas.cache.mixed import Classes, MixedQuantizer, attention_paid, greatest
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.ops.quantize import encode
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.changed import TurnedBody, rotated
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.rows import Rows


@mechanism("akvq-vl", example={"block": 8, "recent": 4, "last": 4, "early_layers": 1})
class AKVQ(MixedQuantizer):
    """Keep most tokens in two bits of rotated numbers."""

    everything: ClassVar[dict[str, Any]] = {"bits": 16, "salient_bits": 16}
    comparable: ClassVar[tuple[str, ...]] = ("",)

    bits: int = option(
        "bits of most tokens: 16 (nothing is rounded), 8, 4, 3, 2 or 1", default=2, kw_only=False
    )
    salient_bits: int = option(
        "bits of text in early layers and of what is attended to in the others", default=4
    )
    images: Sequence[tuple[int, int]] = option(
        "first and last + 1 of each run of image tokens, counted without padding", default=()
    )
    early_layers: int = option(
        "how many of the first layers keep text in more bits", default=2, at_least=0
    )
    salient: float = option(
        "share of tokens that the other layers keep in more bits", default=0.1, at_least=0,
        at_most=1,
    )  # fmt: skip
    pivot_cut: float = option(
        "how far from the median the logarithm of a pivot's norm is", default=5.0, above=0
    )
    last: int = option(
        "how many of the last queries tell what is attended to", default=32, at_least=1
    )
    key_group: int = option(
        "tokens over which a channel of rotated keys has one step; 0 for a step a token", default=32,
        at_least=0,
    )  # fmt: skip
    recent: int = option("newest tokens that stay in full precision", default=32, at_least=0)
    block: int = option("tokens that are encoded together", default=128, at_least=1)

    def setup(self) -> None:
        """Refuse runs of images that are none."""
        super().setup()
        if any(not 0 <= start < stop for start, stop in self.images):
            raise UserError(f"images takes pairs 0 <= start < stop, got {list(self.images)}")

    def precisions(self) -> dict[str, int]:
        """Of most tokens and of salient ones."""
        return {"bits": self.bits, "salient_bits": self.salient_bits}

    def learn(self, state: LayerState, call: Call) -> None:
        """Keep the last queries, where attention tells who is salient."""
        if not self._early(state):
            remember(state, call, lambda rank, count, _: rank >= count - self.last)

    def _early(self, state: LayerState) -> bool:
        return state.layer in state.full[: self.early_layers]

    def worth(
        self, layer: StoredLayer, state: LayerState, rows: Rows
    ) -> Float[Tensor, "batch kv_heads slots"]:
        """1 for text and 0 for images in early layers, attention in the others."""
        if not self._early(state):
            paid = [weights.sum(dim=(2, 3)) for weights in attention_paid(layer, state, rows)]
            return torch.stack(paid).sum(dim=0)
        rank = rows.at(layer.dense_positions())[1]
        text = torch.ones_like(rank, dtype=torch.float32)
        for start, stop in self.images:
            text.masked_fill_((rank >= start) & (rank < stop), 0.0)
        return text

    def classes(
        self,
        state: LayerState,
        taken: Taken,
        worth: Float[Tensor, "batch kv_heads slots"],
        valid: Bool[Tensor, "batch kv_heads slots"],
    ) -> Classes:
        """Pivots, salient tokens and the rest."""
        pivot = valid & (far(taken.k, valid, self.pivot_cut) | far(taken.v, valid, self.pivot_cut))
        plain = valid & ~pivot
        salient = (
            plain & (worth > 0) if self._early(state) else greatest(worth, plain, self.salient)
        )
        return {
            "rest": (plain & ~salient, self.bits),
            "salient": (salient, self.salient_bits),
            "pivots": (pivot, 16),
        }

    def coded(self, state: LayerState, taken: Taken, bits: int) -> Body:
        """Codes of the rotated numbers."""
        k, v = (rotated(x.float()).to(x.dtype) for x in (taken.k, taken.v))
        if self.key_group:
            keys = encode(k, bits, token_group=self.key_group, channel_group=1)
        else:
            keys = encode(k, bits)
        return TurnedBody(keys, encode(v, bits), taken.index)


def far(
    x: Float[Tensor, "batch heads tokens dim"],
    valid: Bool[Tensor, "batch heads tokens"],
    cut: float,
) -> Bool[Tensor, "batch heads tokens"]:
    """Tokens whose norm is far from the median, measured by the median distance from it."""
    norm = torch.linalg.vector_norm(x.float(), dim=-1).clamp(min=1e-12).log()
    norm = norm.masked_fill(~valid, torch.nan)
    away = (norm - norm.nanmedian(dim=-1, keepdim=True).values).abs()
    found: Tensor = away > cut * away.nanmedian(dim=-1, keepdim=True).values
    return found
