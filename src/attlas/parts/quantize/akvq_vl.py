"""AKVQ-VL: two bits for most tokens of a vision-language cache, more for text, pivots and the newest.

    H      Walsh–Hadamard matrix / √n, orthonormal:  (q H) · (k H) = q · k,  Σ w (v H) H = Σ w v
    stored codes of k H and of v H, a step for each token and `channel_group` channels

| layers       | newest tokens | pivots        | text           | images |
|--------------|---------------|---------------|----------------|--------|
| early        | as they are   |               | `salient_bits` | `bits` |
| the others   | as they are   | as they are   | `bits`         | `bits` |

H spreads a channel that is large in all tokens, or a number that is large in one, over all channels.
Codes of two bits span the middle share `clip` of a group's range. Pivots are the `pivots` tokens of the
largest massive activation max_c |x_c| in the residual stream x that enters the layer; they are found
once, when tokens of the layer are first encoded, among all that were seen by then. Codes are rotated back
as they are read. Cost: dim² multiplications a token read. Reduces to full attention at bits=16.

Established by a reader's note of the paper are the table, 15 pivots of massive activations, 128 newest
tokens, the clipping of 0.8 at two bits and none at four, groups of 128, and two early layers (those of
LLaVA-1.5 7B; LLaVA-1.6 on Mistral has none). How activations are ranked, where and when they are looked
for, and between which ends a clipped range lies the paper leaves open: these are our reading.

Source: "AKVQ-VL: Attention-Aware KV Cache Adaptive 2-Bit Quantization for Vision-Language Models".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas.attach.call import Call, Site
from attlas.cache.fitting import narrowed
from attlas.cache.mixed import Classes, MixedQuantizer, widths
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.ops.quantize import check, encode
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.changed import TurnedBody, rotated
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.rows import Rows

#: The most bits whose codes span less than a group's whole range.
CLIPPED = 2


@mechanism("akvq-vl", example={"block": 8, "recent": 4, "pivots": 2, "early_layers": 1})
class AKVQ(MixedQuantizer):
    """Keep most tokens in two bits of rotated numbers."""

    points = ("residual",)
    everything: ClassVar[dict[str, Any]] = {"bits": 16, "salient_bits": 16}
    comparable: ClassVar[tuple[str, ...]] = ("",)

    bits: int = option(
        "bits of most tokens: 16 (nothing is rounded), 8, 4, 3, 2 or 1", default=2, kw_only=False
    )
    salient_bits: int = option("bits of text in early layers", default=4)
    images: Sequence[tuple[int, int]] = option(
        "first and last + 1 of each run of image tokens, counted without padding", default=()
    )
    early_layers: int = option(
        "how many of the first layers keep text in more bits", default=2, at_least=0
    )
    pivots: int = option(
        "tokens that each other layer keeps as they are for their massive activations", default=15,
        at_least=0,
    )  # fmt: skip
    clip: float = option(
        "share of a group's range that codes of two bits or fewer span", default=0.8, above=0,
        at_most=1,
    )  # fmt: skip
    channel_group: int = option(
        "channels of a token that share a step, or all where there are fewer", default=128, at_least=1
    )
    recent: int = option("newest tokens that stay in full precision", default=128, at_least=0)
    block: int = option("tokens that are encoded together", default=128, at_least=1)

    def setup(self) -> None:
        """Refuse runs of images that are none."""
        super().setup()
        if any(not 0 <= start < stop for start, stop in self.images):
            raise UserError(f"images takes pairs 0 <= start < stop, got {list(self.images)}")

    def precisions(self) -> dict[str, int]:
        """Of most tokens and of salient ones."""
        return {"bits": self.bits, "salient_bits": self.salient_bits}

    def formats(self, model: nn.Module) -> None:
        """Refuse heads whose codes would not fill whole bytes, or that the group does not divide."""
        super().formats(model)
        for width in widths(model):
            for bits in set(self.precisions().values()) - {16}:
                check(bits, width, min(self.channel_group, width), 1)

    def stream(self, site: Site, x: Float[Tensor, "batch query width"]) -> None:
        """The largest activation of every token that enters a layer's block."""
        largest = x.detach().abs().amax(dim=-1).float()
        site.forward_pass.shared[self.name, site.layer] = largest

    def learn(self, state: LayerState, call: Call) -> None:
        """Keep them, until the pivots are found.

        Raises:
            ValueError: the layer's block was not seen.
        """
        known = state.tensors.get("largest")
        if self._early(state) or (known is None and "pivots" in state.tensors):
            return
        largest = call.forward_pass.shared.get((self.name, state.layer))
        if largest is None:
            raise UserError(
                f"AKVQ finds its pivots in what enters the block of layer {state.layer}, which "
                f"{type(call.module).__name__} does not show; give early_layers={len(state.full)} to "
                "do without"
            )
        state.tensors["largest"] = largest if known is None else torch.cat([known, largest], dim=1)

    def _early(self, state: LayerState) -> bool:
        return state.layer in state.full[: self.early_layers]

    def worth(
        self, layer: StoredLayer, state: LayerState, rows: Rows
    ) -> Float[Tensor, "batch kv_heads slots"]:
        """1 for text in early layers and for pivots in the others, 0 for the rest."""
        columns = layer.dense_positions()
        if not self._early(state):
            pivots = self._pivots(layer, state, rows)
            return (columns[..., None] == pivots[:, None, None]).any(dim=-1).float()
        rank = rows.at(columns)[1]
        text = torch.ones_like(rank, dtype=torch.float32)
        for start, stop in self.images:
            text.masked_fill_((rank >= start) & (rank < stop), 0.0)
        return text

    def _pivots(
        self, layer: StoredLayer, state: LayerState, rows: Rows
    ) -> Int[Tensor, "batch pivots"]:
        """Columns of the pivots, −2 where there is none; found when a row first has a block to encode."""
        tensors = state.tensors
        if (largest := tensors.get("largest")) is None:
            return tensors["pivots"]
        lengths = torch.tensor(layer.lengths(rows), device=largest.device)
        there = rows.at(torch.arange(largest.shape[1], device=largest.device).expand_as(largest))[0]
        ranked = largest.masked_fill(~there, -torch.inf).sort(dim=1, descending=True, stable=True)
        best = torch.where(ranked.values > -torch.inf, ranked.indices, -2)[:, : self.pivots]
        best = nn.functional.pad(best, (0, self.pivots - best.shape[1]), value=-2)
        begun = tensors.get("begun", torch.zeros_like(lengths, dtype=torch.bool))
        known = tensors.get("pivots", torch.full_like(best, -2))
        tensors["pivots"] = torch.where(begun[:, None], known, best)
        tensors["begun"] = begun | (lengths - self.recent >= self.block)
        if bool(tensors["begun"].all()):
            del tensors["largest"], tensors["begun"]
        return tensors["pivots"]

    def classes(
        self,
        state: LayerState,
        taken: Taken,
        worth: Float[Tensor, "batch kv_heads slots"],
        valid: Bool[Tensor, "batch kv_heads slots"],
    ) -> Classes:
        """Salient tokens, which are text or pivots, and the rest."""
        salient = valid & (worth > 0)
        name, bits = ("text", self.salient_bits) if self._early(state) else ("pivots", 16)
        return {"rest": (valid & ~salient, self.bits), name: (salient, bits)}

    def coded(self, state: LayerState, taken: Taken, bits: int) -> Body:
        """Codes of the rotated numbers, clipped where bits are few."""
        codes = []
        for x in (taken.k, taken.v):
            turned, group = rotated(x.float()), min(self.channel_group, x.shape[-1])
            if bits <= CLIPPED:
                turned = narrowed(turned, turned.new_full((x.shape[1], 1), self.clip), group)
            codes.append(encode(turned.to(x.dtype), bits, channel_group=group))
        return TurnedBody(codes[0], codes[1], taken.index)
