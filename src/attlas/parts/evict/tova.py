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

from attlas.cache.policy import Slots
from attlas.catalog.registry import mechanism
from attlas.parts.evict.snapkv import SnapKV
from attlas.storage.layer import LayerState


@mechanism("tova", paper="snapkv", example={"keep": 0.5})
class TOVA(SnapKV):
    """Keep what the last query reads, averaged over all heads.

    Args:
        keep: share of the context kept, in (0, 1].
        tokens: or tokens kept.
        bytes: or bytes of the whole cache.
        while_decoding: enforce the budget again after every later call, as the paper does.

    Raises:
        ValueError: a budget out of range.
    """

    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)", "(keep=0.25)", "(keep=0.125)")

    def __init__(
        self,
        keep: float | None = None,
        *,
        tokens: int | None = None,
        bytes: int | None = None,
        while_decoding: bool = False,
    ) -> None:
        super().__init__(keep, tokens=tokens, bytes=bytes, window=1, kernel=1)
        self.while_decoding = while_decoding

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """Mean attention of the last query over all heads; its own token above all others."""
        last = (slots.rank == (slots.total - 1)[:, None, None]) & slots.valid
        mean = super().scores(state, slots).mean(dim=1, keepdim=True).expand(last.shape)
        return mean.masked_fill(last, mean.masked_fill(last, 0.0).max().item() + 1)
