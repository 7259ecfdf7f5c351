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
from attlas.options import option
from attlas.storage.layer import LayerState, StoredLayer


@mechanism(
    "streaming-llm", paper="", aliases=("sinks-window",), former=("window",), example={"keep": 0.5}
)  # fmt: skip
class StreamingLLM(CachePolicy):
    """Keep the first tokens and the most recent ones."""

    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)", "(keep=0.25)", "(keep=0.125)")

    sinks: int = option(
        "how many of the first tokens stay; the paper's four", default=4, at_least=0
    )
    rerotate: bool = option("move the sinks' keys next to the newest tokens", default=False)

    def setup(self) -> None:
        """Ask for the model's rotation where keys are to be moved."""
        super().setup()
        self.rotates = self.rerotate
        self.latents = not self.rerotate

    @property
    def floor(self) -> tuple[str, int]:
        """The sinks."""
        return "sinks", self.sinks

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """1 for what stays, 0 for the tokens between sinks and window."""
        pruned = (slots.total - slots.budget)[:, None, None]
        between = (slots.rank >= self.sinks) & (slots.rank < self.sinks + pruned)
        return (~between).float()

    def learn(self, state: LayerState, call: Call) -> None:
        """The next position, and the sinks' keys as they are without rotation, for `rerotate`."""
        if not self.rotates or state.rotary is None or not self.sinks:
            return
        rank, valid = call.ranks
        tensors, latest = state.tensors, call.positions.masked_fill(~valid, -1).amax(dim=-1) + 1
        tensors["next"] = torch.maximum(tensors["next"], latest) if "next" in tensors else latest
        if min(call.counts[0]) >= self.sinks:
            return
        k = call.k[:, :, -rank.shape[1] :]
        # Un-rotated by the frequencies of their own call; others may come later.
        raw = state.rotary.unrotate(k, call.positions)
        shape = (*k.shape[:2], self.sinks, k.shape[3])
        sinks = tensors["sinks"].clone() if "sinks" in tensors else raw.new_zeros(shape)
        row, token = (valid & (rank < self.sinks)).nonzero(as_tuple=True)
        sinks[row, :, rank[row, token]] = raw[row, :, token]
        tensors["sinks"] = sinks

    def placed(self, layer: StoredLayer, state: LayerState, total: Int[Tensor, " batch"]) -> None:
        """Rotate the sinks' keys to positions next to the window."""
        rotary, tensors, keys = state.rotary, state.tensors, layer.keys
        if not self.rotates or rotary is None or not self.sinks or keys is None:
            return
        number = torch.arange(self.sinks, device=keys.device)
        held = (layer.index[:, 0] >= 0).sum(dim=-1) if layer.index is not None else total
        moved = rotary.rotate(tensors["sinks"], (tensors["next"] - held)[:, None] + number)
        layer.keys = torch.cat([moved.to(keys.dtype), keys[:, :, self.sinks :]], dim=2)
