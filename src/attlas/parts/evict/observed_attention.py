"""Observed attention: keep what all queries so far have read most, the heavy hitters.

    S(j)     = Σ_i A_ij                 over the queries so far, padding left out
    score(j) = mean over the query heads of a key head of  S(j) / (queries that can see j)

Early tokens are seen by more queries, which the division makes up for. H2O ranks the sums undivided
(`divide=False`), always keeps recent tokens (`recent`, half of its budget) and holds the budget at
every step (`while_decoding`).

Cost: the attention weights once more, a block at a time, hence memory linear in length; one number a
key is remembered. Keeps everything, hence reduces to full attention, at keep = 1.

Source: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models"; the
division and the mean over a group of heads follow common implementations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attlas.attach.blocks import weight_blocks
from attlas.attach.call import Call
from attlas.cache.policy import CachePolicy, Slots
from attlas.catalog.registry import mechanism
from attlas.options import option
from attlas.storage.layer import LayerState, StoredLayer
from attlas.storage.rows import Rows


@mechanism("observed-attention", paper="", aliases=("h2o",), example={"keep": 0.5})
class ObservedAttention(CachePolicy):
    """Keep the keys that have received most attention."""

    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)", "(keep=0.25)", "(keep=0.125)")

    recent: int = option("newest tokens that always stay", default=0, at_least=0)
    divide: bool = option(
        "divide by the number of queries that can see a key; H2O does not", default=True
    )
    while_decoding: bool = option(
        "count on and enforce the budget again after every later call", default=False
    )

    @property
    def floor(self) -> tuple[str, int]:
        """The recent tokens."""
        return "recent", self.recent

    def learn(self, state: LayerState, call: Call) -> None:
        """Add the columns of a call's weights up, slot by slot."""
        batch, heads, slots, _ = call.k.shape
        sums = torch.zeros(batch, call.q.shape[1], slots, device=call.k.device)
        for weights, _, _ in weight_blocks(call):
            sums[..., : weights.shape[-1]] += weights.sum(dim=2)
        mean = rearrange(sums, "b (h g) t -> b h g t", h=heads).mean(dim=2)
        if (known := state.tensors.get("sums")) is not None:
            mean += F.pad(known, (0, slots - known.shape[-1]))
        state.tensors["sums"] = mean

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Count on with the keys that are still held, and enforce the budget."""
        if not self.while_decoding:
            return
        columns, keys, values = layer.dense_positions(), layer.keys, layer.values
        assert keys is not None
        assert values is not None
        there = layer.there(call.rows)
        seen = there[:, :, None] & (columns[:, :, None] <= call.queries[:, None])
        seen = seen.repeat_interleave(call.groups, dim=1)
        self.learn(state, replace(call, k=keys, v=values, original_positions=columns, mask=seen))
        self.compress(layer, state, call.rows)

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Keep the best slots, and their sums where these will be counted on."""
        before = layer.dense_positions()
        super().compress(layer, state, rows)
        if self.while_decoding:
            # A hole takes the column before it, so that columns stay in order.
            order = before.cummax(dim=-1).values.contiguous()
            at = torch.searchsorted(order, layer.dense_positions().clamp(min=0).contiguous())
            state.tensors["sums"] = state.tensors["sums"].gather(-1, at)

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """Mean attention received; the recent tokens above all others."""
        scores = state.tensors["sums"]
        if self.divide:
            scores = scores / (slots.total[:, None, None] - slots.rank).clamp(min=1)
        recent = slots.rank >= (slots.total - self.recent)[:, None, None]
        return scores.masked_fill(recent & slots.valid, scores.max().item() + 1)
