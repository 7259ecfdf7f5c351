"""WKVQuant's cache: numbers shifted and scaled per channel by what was learned, then coded per token.

    y  = (x − δ) / s           δ, s: a constant for each channel, fixed beforehand
    ŷ  = code · step + zero     of a token's group of channels, its range narrowed to c · range
    x̂  = ŷ · s + δ              c: clipping, one for each head

Past only: a token's own key and value are those of full precision in its own step, and are rounded
once it is past (here when `recent` newer ones and a whole block have come). δ begins in the middle of
a channel's range and s at the root of its half-width; δ, s and c are then fitted by gradients through
the rounding to the loss

    Σ over layers of mean |o_l − ô_l| / mean |o_l|      o: outputs of the attention heads

while all layers are rounded at once, so that a layer's constants answer for what they do to the layers
behind it. Cost: reading adds δ and multiplies by s. δ, s and c change nothing where nothing is rounded:
at 16 bits it reduces to full attention.

This is the half of the paper that is about the cache: the model's weights stay as they are, where the
paper holds them in four bits too and fits their clipping by the same loss. What is established, by
summaries of its text, are the three parts: the past alone is rounded; static shift and scale of channels
under dynamic groups of a token; and a mean absolute error of the outputs of the following blocks, five of
them, in the fit, which goes block by block. Neither the formula of that loss nor the groups and ranges of
weights are; so here all layers are fitted together over the outputs of their attention, and the starting
points of δ and s are ours. That four-bit weights with this cache lose less than without its three parts
is not shown here.

Source: "WKVQuant: Quantizing Weight and Key/Value Cache for Large Language Models Gains More".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.cache.fitting import fitted, narrowed
from attlas.cache.mixed import widths
from attlas.cache.quantizer import Quantizer, offered
from attlas.calibration import Calibrated
from attlas.catalog.registry import mechanism
from attlas.ops.quantize import Codes, check, encode
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.changed import ShiftedBody
from attlas.storage.layer import LayerState, Taken
from attlas.storage.packed import PackedBody


@mechanism("wkvquant", example={"block": 4, "steps": 4, "length": 48})
class WKVQuant(Calibrated, Quantizer):
    """Keep the past in few bits, shifted, scaled and clipped by learned constants."""

    everything: ClassVar[dict[str, Any]] = {"bits": 16}

    bits: int = option(
        "bits of a number: 16 (nothing is rounded), 8, 4, 3, 2 or 1", default=4, kw_only=False
    )
    channel_group: int | None = option(
        "channels of a token that share a step; all unless given", default=None, at_least=1
    )
    recent: int = option(
        "newest tokens that stay in full precision, among them the token of the step", default=1,
        at_least=1,
    )  # fmt: skip
    block: int = option("tokens that are encoded together", default=16, at_least=1)
    steps: int = option(
        "steps of the fit, each over one text; 0 leaves the constants where they begin", default=40,
        at_least=0,
    )  # fmt: skip
    length: int = option("tokens of a text that a step reads", default=256, at_least=2)
    rate: float = option("learning rate of the fit", default=5e-3, above=0)

    def setup(self) -> None:
        """Refuse bits that are not offered."""
        super().setup()
        offered(bits=self.bits)

    @property
    def calibration_key(self) -> str:
        """The name, and the codes that the constants were fitted to."""
        group = self.channel_group or "all"
        return f"{super().calibration_key},bits={self.bits},group={group}"

    def fit(
        self,
        model: nn.Module,
        texts: Sequence[Int[Tensor, "1 tokens"]],
        tick: Callable[[int, int], None],
        partial: Path | None,
    ) -> dict[str, Tensor]:
        """The constants of every layer."""
        self.formats(model)
        pieces = [t[:, : self.length] for t in texts]
        return fitted(self, model, pieces, tick, partial)

    def formats(self, model: nn.Module) -> None:
        """Refuse heads whose codes would not fill whole bytes, or that the group does not divide."""
        for width in widths(model):
            if self.bits != 16:
                check(self.bits, width, self.channel_group or width, 1)

    def encode(self, state: LayerState, taken: Taken) -> dict[str, Body]:
        """One body for all."""
        if self.bits == 16:
            return {"context": PackedBody(taken.k, taken.v, taken.index, taken.first)}
        k, k_shift = self._coded(f"{state.layer}.k", taken.k)
        v, v_shift = self._coded(f"{state.layer}.v", taken.v)
        body = ShiftedBody(k, v, taken.index, taken.first, shifts=(k_shift, v_shift))
        return {"context": body}

    def _coded(
        self, name: str, x: Float[Tensor, "batch heads tokens dim"]
    ) -> tuple[Codes, Float[Tensor, "batch heads 1 dim"]]:
        """(codes of the shifted, scaled and narrowed numbers, the shift)."""
        parts = (self.statistics[f"{name}.{what}"] for what in ("shift", "scale", "clip"))
        shift, scale, clip = parts
        group = self.channel_group or x.shape[-1]
        y = narrowed((x.float() - shift[:, None]) / scale[:, None], clip, group)
        channel, shift = (
            t[None, :, None].to(x.dtype).expand(x.shape[0], -1, -1, -1).contiguous()
            for t in (scale, shift)
        )
        # Given as y · s, so that dividing by s gives what was narrowed.
        wide = (y * channel.float()).to(x.dtype)
        return encode(wide, self.bits, channel_group=group, channel=channel), shift
