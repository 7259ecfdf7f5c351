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
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.cache.mixed import (
    attention_paid,
    greatest,
    parted,
    remember,
    spread,
    taken_columns,
    widths,
)
from attlas.cache.quantizer import Quantizer, offered
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.ops.quantize import check, encode
from attlas.storage.body import Body
from attlas.storage.changed import TurnedBody, rotated
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.packed import PackedBody
from attlas.storage.rows import Rows


@mechanism("akvq-vl", example={"block": 8, "recent": 4, "last": 4, "early_layers": 1})
class AKVQ(Quantizer):
    """Keep most tokens in two bits of rotated numbers.

    Args:
        bits: of most tokens: 16 (nothing is rounded), 8, 4, 3, 2 or 1.
        salient_bits: of text in early layers and of what is attended to in the others.
        images: first and last + 1 of each run of image tokens, counted without padding.
        early_layers: how many of the first layers keep text in more bits.
        salient: share of tokens that the other layers keep in more bits.
        pivot_cut: how far from the median the logarithm of a pivot's norm is.
        last: how many of the last queries tell what is attended to.
        key_group: tokens over which a channel of rotated keys has one step; 0 for a step a token.
        recent: newest tokens that stay in full precision.
        block: tokens encoded together.

    Raises:
        ValueError: bits that are not offered, shares or runs out of order.
    """

    everything: ClassVar[dict[str, Any]] = {"bits": 16, "salient_bits": 16}
    comparable: ClassVar[tuple[str, ...]] = ("",)

    def __init__(
        self,
        bits: int = 2,
        salient_bits: int = 4,
        *,
        images: Sequence[tuple[int, int]] = (),
        early_layers: int = 2,
        salient: float = 0.1,
        pivot_cut: float = 5.0,
        last: int = 32,
        key_group: int = 32,
        recent: int = 32,
        block: int = 128,
    ) -> None:
        super().__init__(recent=recent, block=block)
        offered(bits=bits, salient_bits=salient_bits)
        if not 0 <= salient <= 1:
            raise UserError(f"salient must be in [0, 1], got {salient}")
        if any(not 0 <= start < stop for start, stop in images):
            raise UserError(f"images takes pairs 0 <= start < stop, got {list(images)}")
        for name, number in (("last", last - 1), ("early_layers", early_layers),
                             ("key_group", key_group)):  # fmt: skip
            if number < 0:
                raise UserError(f"{name} is too small")
        if not pivot_cut > 0:
            raise UserError(f"pivot_cut must be above 0, got {pivot_cut}")
        self.bits, self.salient_bits = bits, salient_bits
        self.images, self.early_layers, self.salient = tuple(images), early_layers, salient
        self.pivot_cut, self.last, self.key_group = pivot_cut, last, key_group

    def formats(self, model: nn.Module) -> None:
        """Refuse heads whose codes would not fill whole bytes."""
        for width in widths(model):
            for bits in {self.bits, self.salient_bits} - {16}:
                check(bits, width, 1, 1)

    def learn(self, state: LayerState, call: Call) -> None:
        """Keep the last queries, where attention tells who is salient."""
        if not self._early(state):
            remember(state, call, lambda rank, count, _: rank >= count - self.last)

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Keep the last queries, and encode a block at a time."""
        self.learn(state, call)
        self.compress(layer, state, call.rows)

    def _early(self, state: LayerState) -> bool:
        return state.layer in state.full[: self.early_layers]

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Say who is salient, and encode all but the newest tokens."""
        if max(layer.lengths(rows), default=0) - self.recent < self.block:
            return
        if self._early(state):
            rank = rows.at(layer.dense_positions())[1]
            worth = torch.ones_like(rank, dtype=torch.float32)
            for start, stop in self.images:
                worth.masked_fill_((rank >= start) & (rank < stop), 0.0)
        else:
            worth = torch.stack(
                [w.sum(dim=(2, 3)) for w in attention_paid(layer, state, rows)]
            ).sum(dim=0)
        state.tensors["worth"] = spread(layer, worth)
        super().compress(layer, state, rows)
        del state.tensors["worth"]

    def encode(self, state: LayerState, taken: Taken) -> dict[str, Body]:
        """A body for each of the three classes."""
        columns = taken_columns(taken)
        valid = columns >= 0
        worth = state.tensors["worth"].gather(-1, columns.clamp(min=0).long())
        pivot = valid & (far(taken.k, valid, self.pivot_cut) | far(taken.v, valid, self.pivot_cut))
        plain = valid & ~pivot
        salient = (
            plain & (worth > 0) if self._early(state) else greatest(worth, plain, self.salient)
        )
        classes = {
            "rest": (plain & ~salient, self.bits),
            "salient": (salient, self.salient_bits),
            "pivots": (pivot, 16),
        }
        found = ((name, parted(taken, of), bits) for name, (of, bits) in classes.items())
        return {name: self._body(t, bits) for name, t, bits in found if t is not None}

    def _body(self, taken: Taken, bits: int) -> Body:
        if bits == 16:
            return PackedBody(taken.k, taken.v, taken.index)
        k, v = (
            rotated(taken.k.float()).to(taken.k.dtype),
            rotated(taken.v.float()).to(taken.v.dtype),
        )
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
