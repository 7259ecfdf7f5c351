"""Ada-KV: heads of a layer share its budget by what they read, instead of equally.

With n slots per head on average and h key heads, the layer's h·n best scores stay, whatever the head,

    n_safe = ⌊α n⌋ best of every head stay in any case;    then the best of all heads together

Scores are attention weights, so a head that reads few keys closely gives slots to one that reads many.
Heads then hold unequal numbers of keys, stored one behind the other: what is dropped is freed, not
hidden. The scorer is SnapKV unless another is named; over PyramidKV's scorer and budgets per layer
with `scorer="pyramid-kv"`.

Cost: the scorer's, and one more ranking. Keeps everything, hence reduces to full attention, at
keep = 1, and to the scorer alone at alpha = 1.

Source: "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
Inference".
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas.cache.part import Role
from attlas.cache.policy import Slots
from attlas.cache.scored import ScoredPolicy
from attlas.catalog.registry import mechanism
from attlas.options import option
from attlas.storage.layer import LayerState, StoredLayer
from attlas.storage.ragged import RaggedBody


@mechanism(
    "ada-kv", paper="snapkv", aliases=("adakv",),
    example={"keep": 0.5, "scorer_options": {"window": 4}},
)  # fmt: skip
class AdaKV(ScoredPolicy):
    """Budgets per head within a layer, over another policy's scores."""

    #: What lies in a ragged body is not ranked again.
    without = ("while_decoding",)
    #: Heads of unequal length leave no common blocks to encode or pages to choose from.
    joins: ClassVar[tuple[Role, ...]] = ()
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)", "(keep=0.25)", "(keep=0.125)")

    alpha: float = option(
        "share of the average budget that every head has for sure", default=0.2, at_least=0,
        at_most=1,
    )  # fmt: skip

    def budgets(self, state: LayerState, slots: Slots) -> Int[Tensor, " batch"]:
        """The scorer's; of bytes, a slot less for the heads' offsets and lengths."""
        found = self.ranker.budgets(state, slots)
        if self.budget.bytes is None:
            return found
        return torch.where(found < slots.total, (found - 1).clamp(min=1), found)

    def drop(self, layer: StoredLayer, slots: Slots, scores: Float[Tensor, "b h slots"]) -> None:
        """Hold each head's share alone, in a ragged body; the dense slots are emptied."""
        keep = shared(scores, slots.valid, slots.budget, self.alpha)
        layer.put("kept", RaggedBody.kept(slots.keys, slots.values, slots.original_position, keep))
        layer.keys, layer.values = slots.keys[:, :, :0].clone(), slots.values[:, :, :0].clone()


def shared(
    scores: Float[Tensor, "batch kv_heads slots"],
    valid: Bool[Tensor, "batch kv_heads slots"],
    budget: Int[Tensor, " batch"],
    alpha: float,
) -> Bool[Tensor, "batch kv_heads slots"]:
    """Which slots stay: of every row as many as its heads' budgets together.

    Of equal scores the earlier slot stays, in the first of the heads.
    """
    keep = torch.zeros_like(valid)
    heads = scores.shape[1]
    for row, count in enumerate(budget.tolist()):
        there = valid[row, 0].nonzero()[:, 0]  # padding is the same for all heads
        ranked = scores[row, :, there]
        safe = ranked.argsort(dim=-1, descending=True, stable=True)[:, : int(alpha * count)]
        ranked = ranked.scatter(-1, safe, torch.inf).flatten()
        chosen = torch.zeros_like(ranked, dtype=torch.bool)
        chosen[ranked.argsort(descending=True, stable=True)[: heads * count]] = True
        keep[row, :, there] = chosen.view(heads, -1)
    return keep
