"""ZipCache: the tokens that get attention in more bits, measured by a few probe queries.

    s(j)   = Σ over probes i of A[i, j] / (T − j)       A = softmax(q k^T / √d), causal
    salient = all but the ⌊ratio · n⌋ tokens of least s, for each key head
    c_d    = √(max over tokens of |x_d|)                 x̂ = (code · step + zero) · c
    step, zero: of one row, which is the r-th token of every head, after the division by c

T − j queries can see column j, so that early tokens are not thought salient for their age alone. The
sum runs over the query heads of a key head. Probes are the newest 5 % of the queries and 5 % drawn at
random. Dividing each channel by c lets one step stand for a whole row, which for keys may instead be
one step a channel over all tokens encoded together (`keys="channel"`, the authors' own choice).

Cost: a tenth of the attention matrix once, and 5 + 5 queries for every `block` new tokens, which are
encoded together and attended to exactly until then. With 16 bits for both classes it reduces to full
attention. The authors divide by T − j for any set of probes, and in decoding ask the newest query
alone and do not divide; here a block is measured as the prompt is.

Source: "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification".
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.attach.call import Call
from attlas.cache.asked import drawn, remember
from attlas.cache.mixed import Classes, MixedQuantizer, attention_paid, greatest, taken_columns
from attlas.catalog.registry import mechanism
from attlas.ops.quantize import encode
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.rows import Rows
from attlas.storage.shared import SharedBody, encode_rows


@mechanism("zipcache", example={"block": 8})
class ZipCache(MixedQuantizer):
    """Keep salient tokens in more bits than the others."""

    everything: ClassVar[dict[str, Any]] = {"salient_bits": 16, "other_bits": 16}
    comparable: ClassVar[tuple[str, ...]] = ("",)

    salient_bits: int = option(
        "bits of salient tokens: 16 (as they are), 8, 4, 3, 2 or 1", default=4, kw_only=False
    )
    other_bits: int = option("bits of the others", default=2, kw_only=False)
    ratio: float = option(
        "share of the tokens that are not salient", default=0.4, at_least=0, at_most=1
    )
    keys: Literal["channel", "token"] = option(
        "channel: a key's channel has one step over all tokens of a body; token: keys are coded as "
        "values are", default="channel",
    )  # fmt: skip
    probes: float = option(
        "share of the queries that are probes for being new, and again drawn at random", default=0.05,
        above=0, at_most=0.5,
    )  # fmt: skip
    block: int = option("tokens that are encoded together", default=100, at_least=1)
    recent: int = option("newest tokens that stay in full precision", default=0, at_least=0)
    seed: int = option("seed of the drawing of probes", default=0)

    def precisions(self) -> dict[str, int]:
        """Of salient tokens and of the others."""
        return {"salient_bits": self.salient_bits, "other_bits": self.other_bits}

    def learn(self, state: LayerState, call: Call) -> None:
        """Keep the probes among the queries so far."""
        remember(state, call, lambda rank, count, _: self._probes(rank, count, count))

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Keep probes among the tokens that are not encoded yet, and encode a block at a time."""

        def rule(rank: Tensor, count: Tensor, before: Tensor) -> Tensor:
            encoded = (before - self.recent).clamp(min=0) // self.block * self.block
            return (rank >= encoded) & self._probes(rank, count, torch.full_like(count, self.block))

        remember(state, call, rule)
        super().compress(layer, state, call.rows)

    def _probes(self, rank: Tensor, count: Tensor, span: Tensor) -> Tensor:
        """The newest of `span` queries, and drawn ones."""
        newest = rank >= count - (self.probes * span).ceil()
        return newest | (drawn(rank, self.seed) < self.probes)

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """The prompt is over: its probes are asked for the last time."""
        super().compress(layer, state, rows)
        for name in ("queries", "columns"):
            state.tensors.pop(name, None)

    def worth(
        self, layer: StoredLayer, state: LayerState, rows: Rows
    ) -> Float[Tensor, "batch kv_heads slots"]:
        """What the probes attend to."""
        return saliency(layer, state, rows)

    def classes(
        self,
        state: LayerState,
        taken: Taken,
        worth: Float[Tensor, "batch kv_heads slots"],
        valid: Bool[Tensor, "batch kv_heads slots"],
    ) -> Classes:
        """Salient tokens and the others."""
        other = least(worth, valid, self.ratio)
        return {"salient": (valid & ~other, self.salient_bits), "other": (other, self.other_bits)}

    def encode(self, state: LayerState, taken: Taken) -> dict[str, Body]:
        """The bodies; the prompt's factors of channels serve what follows too."""
        valid = taken_columns(taken) >= 0
        for name, x in self._separated(taken).items():
            if name not in state.tensors:
                state.tensors[name] = channel_scale(x, valid).to(torch.float16)
        return super().encode(state, taken)

    def _separated(self, taken: Taken) -> dict[str, Tensor]:
        """What is divided by factors of channels."""
        if self.salient_bits == self.other_bits == 16:
            return {}
        values = {"values": taken.v}
        return values if self.keys == "channel" else {"keys": taken.k, **values}

    def coded(self, state: LayerState, taken: Taken, bits: int) -> Body:
        """Codes of whole rows, or of channels for keys."""
        if self.keys == "channel":
            k = encode(taken.k, bits, token_group=taken.k.shape[2], channel_group=1)
        else:
            k = encode_rows(taken.k, bits, channel=state.tensors["keys"].clone())
        v = encode_rows(taken.v, bits, channel=state.tensors["values"].clone())
        return SharedBody(k, v, taken.index)


def saliency(
    layer: StoredLayer, state: LayerState, rows: Rows
) -> Float[Tensor, "batch kv_heads slots"]:
    """Attention that the probes pay to each dense slot, by the number of queries that can see it."""
    rank = rows.at(layer.dense_positions())[1]
    paid = torch.zeros(rank.shape, device=rank.device)
    for weights in attention_paid(layer, state, rows):
        paid += weights.sum(dim=(2, 3))
    return paid / (rows.totals(paid.shape[0], paid.device)[:, None, None] - rank).clamp(min=1)


def least(
    scores: Float[Tensor, "batch kv_heads slots"],
    valid: Bool[Tensor, "batch kv_heads slots"],
    ratio: float,
) -> Bool[Tensor, "batch kv_heads slots"]:
    """The ⌊ratio · n⌋ valid slots of least score, n of them by row and head."""
    return greatest(-scores, valid, ratio)


def channel_scale(
    x: Float[Tensor, "batch heads tokens dim"], valid: Bool[Tensor, "batch heads tokens"]
) -> Float[Tensor, "batch heads 1 dim"]:
    """√(max |x|) of each channel over the valid tokens; 1 for a channel that is 0 throughout."""
    largest = x.float().abs().masked_fill(~valid[..., None], 0.0).amax(dim=2, keepdim=True).sqrt()
    return torch.where(largest == 0, 1.0, largest)
