"""Sinks and a window: keep the first tokens, which soak up attention, and the most recent ones.

    kept = {0 … s−1} ∪ {T − (n − s) … T−1}

With `rerotate`, keys are rotated so that the kept tokens stand side by side up to the present, as the
paper does by giving positions inside the cache: the window's keys stay, the sinks move next to it.
RoPE sees relative positions alone, so this equals counting positions from zero in the cache.

Cost: none beyond the gather. Keeps everything, hence reduces to full attention, at keep = 1.

Source: "Efficient Streaming Language Models with Attention Sinks".
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach.call import Call
from attlas.cache.policy import CachePolicy, Slots
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.storage.layer import LayerState, StoredLayer
from attlas.storage.rotary import turn


@mechanism("window", paper="", aliases=("streaming-llm", "sinks-window"), example={"keep": 0.5})
class SinksWindow(CachePolicy):
    """Keep the first tokens and the most recent ones.

    Args:
        keep: share of the context kept, in (0, 1], sinks included.
        tokens: or tokens kept, sinks included.
        bytes: or bytes of the whole cache.
        sinks: how many of the first tokens stay; the paper's four.
        rerotate: move the sinks' keys next to the window.
        while_decoding: enforce the budget again after every later call.

    Raises:
        ValueError: a budget out of range, or not larger than the sinks.
    """

    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)", "(keep=0.25)", "(keep=0.125)")

    def __init__(
        self,
        keep: float | None = None,
        *,
        tokens: int | None = None,
        bytes: int | None = None,
        sinks: int = 4,
        rerotate: bool = False,
        while_decoding: bool = False,
    ) -> None:
        super().__init__(keep, tokens=tokens, bytes=bytes, while_decoding=while_decoding)
        if sinks < 0:
            raise UserError(f"sinks must be at least 0, got {sinks}")
        self.sinks = sinks
        self.rotates = rerotate

    @property
    def floor(self) -> tuple[str, int]:
        """The sinks."""
        return "sinks", self.sinks

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """1 for what stays, 0 for the tokens between sinks and window."""
        pruned = (slots.real - slots.budget)[:, None, None]
        between = (slots.rank >= self.sinks) & (slots.rank < self.sinks + pruned)
        return (~between).float()

    def learn(self, state: LayerState, call: Call) -> None:
        """The positions of the first token and of the next one, for `rerotate`."""
        if not self.rotates:
            return
        rank, real = call.ranks
        latest = call.positions.masked_fill(~real, -1).amax(dim=-1) + 1
        first = (call.positions - rank).masked_fill(~real, torch.iinfo(torch.int64).max).amin(-1)
        tensors = state.tensors
        tensors["next"] = torch.maximum(tensors["next"], latest) if "next" in tensors else latest
        tensors["first"] = torch.minimum(tensors["first"], first) if "first" in tensors else first

    def placed(self, layer: StoredLayer, state: LayerState, real: Int[Tensor, " batch"]) -> None:
        """Move the sinks' keys next to the window, from where they were first rotated to."""
        rotary, tensors, keys = state.rotary, state.tensors, layer.keys
        if not self.rotates or rotary is None or not self.sinks or keys is None:
            return
        number = torch.arange(self.sinks, device=keys.device)
        held = (layer.index[:, 0] >= 0).sum(dim=-1) if layer.index is not None else real
        old = tensors["first"][:, None] + number
        new = (tensors["next"] - held)[:, None] + number
        original = tensors.get("sinks")
        if original is None:
            cos, sin = rotary.back(old)
            original = turn(keys[:, :, : self.sinks].float(), cos[:, None], sin[:, None])
            if self.while_decoding:
                tensors["sinks"] = original
        moved = rotary.rotate(original, new).to(keys.dtype)
        layer.keys = torch.cat([moved, keys[:, :, self.sinks :]], dim=2)
