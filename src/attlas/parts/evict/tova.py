"""TOVA: the last query says, for all heads together, which tokens the cache can do without.

    A        = softmax(q kᵀ / √d)       of the last query over all keys
    score(j) = mean of A[j] over all query heads;   the last token stays

All heads keep the same tokens. Held to the budget after every step (`while_decoding`), the cache is
the state of an RNN with many cells: each step adds a token and drops the one that is read least. It
is SnapKV with a window of one query and no pooling, whose heads vote together.

Cost: one more row of attention per layer; that query is remembered while decoding. Keeps everything,
hence reduces to full attention, at keep = 1.

Source: "Transformers are Multi-State RNNs", after its use as a baseline in common implementations.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from attlas.attach.call import Call
from attlas.cache.asked import asked_weights, remember
from attlas.cache.policy import CachePolicy, Slots
from attlas.catalog.registry import mechanism
from attlas.storage.layer import LayerState


@mechanism("tova", paper="snapkv", example={"keep": 0.5})
class TOVA(CachePolicy):
    """Keep what the last query reads, averaged over all heads."""

    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)", "(keep=0.25)", "(keep=0.125)")

    def learn(self, state: LayerState, call: Call) -> None:
        """The last valid query of each row."""
        remember(state, call, lambda rank, count, _: rank == count - 1)

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """Mean attention of the last query over all heads; its own token above all others."""
        last = (slots.rank == (slots.total - 1)[:, None, None]) & slots.valid
        mean = asked_weights(state, slots)[:, :, :, 0].mean(dim=2).mean(dim=1, keepdim=True)
        return mean.expand(last.shape).masked_fill(last, mean.max().item() + 1)
