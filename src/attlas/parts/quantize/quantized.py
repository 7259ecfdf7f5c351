"""Quantised cache: keys in few bits per channel, values in few bits per token.

    keys    x̂ = code · step + zero     step and zero for each channel over a run of `key_group` tokens
    values  x̂ = code · step + zero     step and zero for each token over `channel_group` channels

Channels of keys differ far more than tokens do, and a few of them are large in every token, so keys
are grouped along tokens; values have no such channels. The newest tokens stay as they are and are
encoded a whole group at a time. Cost: a pass over what is encoded; bytes fall from 16 bits a number
to bits + 32 / (numbers of a group). At 16 bits nothing is rounded: full attention.

Source: the scheme of "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache".
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from attlas.cache.mixed import widths
from attlas.cache.quantizer import Quantizer, offered
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.ops.quantize import check, encode
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.coded import CodedBody
from attlas.storage.layer import LayerState, Taken
from attlas.storage.packed import PackedBody


@mechanism(
    "quantized-cache", paper="", aliases=("kivi",), example={"bits": 4, "key_group": 8, "recent": 4}
)
class QuantizedCache(Quantizer):
    """Keep the context in few bits, the newest tokens in full precision."""

    latents = True
    everything: ClassVar[dict[str, Any]] = {"bits": 16}
    comparable: ClassVar[tuple[str, ...]] = (
        "(bits=8)", "(bits=4)", "(bits=3)", "(bits=2)",
        "(bits=4)+quest-page-selection(keep=0.125)",
    )  # fmt: skip

    bits: int = option(
        "bits of a number: 16 (nothing is rounded), 8, 4, 3, 2 or 1", default=4, kw_only=False
    )
    key_bits: int = option("bits of keys; `bits` unless given", factory=lambda part: part.bits)
    value_bits: int = option("bits of values; `bits` unless given", factory=lambda part: part.bits)
    key_group: int = option(
        "tokens over which a channel of keys has one step, and which are encoded at once; 32, and 16 "
        "for keys of 2 bits or fewer, which larger groups harm most, unless given", at_least=1,
        factory=lambda part: 16 if part.key_bits <= 2 else 32,
    )  # fmt: skip
    channel_group: int | None = option(
        "channels of a value that share a step; 64, or all where 64 do not divide them, unless given",
        default=None, at_least=1,
    )  # fmt: skip
    recent: int = option("newest tokens that stay in full precision", default=64, at_least=0)

    def setup(self) -> None:
        """Refuse bits that are not offered, and 16 for keys or values alone."""
        super().setup()
        self.block = self.key_group
        offered(key_bits=self.key_bits, value_bits=self.value_bits)
        if (self.key_bits == 16) != (self.value_bits == 16):
            raise UserError(
                f"16 bits are for keys and values together, got key_bits={self.key_bits} and "
                f"value_bits={self.value_bits}"
            )

    def formats(self, model: nn.Module) -> None:
        """Refuse heads whose codes would not fill whole bytes, or that the groups do not divide."""
        if self.key_bits == 16:
            return
        for width in widths(model):
            check(self.key_bits, width, 1, self.key_group)
            check(self.value_bits, width, self._channels(width), 1)

    def _channels(self, width: int) -> int:
        if self.channel_group is not None:
            return self.channel_group
        return 64 if width % 64 == 0 else width

    def encode(self, state: LayerState, taken: Taken) -> dict[str, Body]:
        """One body for all."""
        if self.key_bits == 16:
            return {"context": PackedBody(taken.k, taken.v, taken.index, taken.first)}
        k = encode(taken.k, self.key_bits, token_group=self.key_group, channel_group=1)
        channels = self._channels(taken.v.shape[-1])
        v = encode(taken.v, self.value_bits, channel_group=channels)
        return {"context": CodedBody(k, v, taken.index, taken.first)}
