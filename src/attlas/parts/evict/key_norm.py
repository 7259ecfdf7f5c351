"""Key-norm eviction: keys of small norm are the ones that get attention, so these stay.

    score(j) = −‖k_j‖₂        of the key as cached, per key head

Cost: one norm per key; no attention weight is computed. The first layers, where the correlation
does not hold, stay whole, and the others hold correspondingly less. Keeps everything, hence reduces
to full attention, at keep = 1.

Source: "A Simple and Effective L_2 Norm-Based Strategy for KV Cache Compression".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attlas.cache.policy import CachePolicy, Slots
from attlas.catalog.registry import mechanism
from attlas.storage.layer import LayerState


@mechanism("key-norm-eviction", aliases=("knorm", "key-norm"), example={"keep": 0.5})
class KeyNorm(CachePolicy):
    """Keep the keys of smallest norm.

    Args:
        keep: share of the context kept, in (0, 1].
        tokens: or tokens kept, on average over the layers.
        bytes: or bytes of the whole cache.
        skip_layers: layers that stay whole, paid for by the others; the paper's first two.
        while_decoding: enforce the budget again after every later call.

    Raises:
        ValueError: a budget out of range, or one that the whole layers use up.
    """

    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)",)

    def __init__(
        self,
        keep: float | None = None,
        *,
        tokens: int | None = None,
        bytes: int | None = None,
        skip_layers: Sequence[int] = (0, 1),
        while_decoding: bool = False,
    ) -> None:
        super().__init__(keep, tokens=tokens, bytes=bytes, while_decoding=while_decoding)
        self.skip_layers = tuple(skip_layers)

    @property
    def skipped(self) -> tuple[int, ...]:
        """`skip_layers`."""
        return self.skip_layers

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """Minus the norm of each key."""
        norms: Tensor = torch.linalg.vector_norm(slots.keys.float(), dim=-1)
        return -norms
