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
from attlas.options import option
from attlas.storage.layer import LayerState


@mechanism("key-norm-eviction", aliases=("knorm", "key-norm"), example={"keep": 0.5})
class KeyNorm(CachePolicy):
    """Keep the keys of smallest norm."""

    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)",)

    skip_layers: Sequence[int] = option(
        "layers that stay whole, paid for by the others; the paper's first two", default=(0, 1)
    )

    @property
    def skipped(self) -> tuple[int, ...]:
        """`skip_layers`."""
        return tuple(self.skip_layers)

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """Minus the norm of each key."""
        norms: Tensor = torch.linalg.vector_norm(slots.keys.float(), dim=-1)
        return -norms
