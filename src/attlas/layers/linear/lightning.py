"""Lightning attention: linear attention without features or divisor, that forgets at a rate per head.

    y_t = Σ_{s≤t} e^{−λ_h (t−s)} (q_t·k_s) v_s      S_t = e^{−λ_h} S_{t−1} + k_t v_tᵀ     y_t = S_tᵀ q_t
    λ_h = 2^{−8h/H} · (1 − l/(L−1) + 10⁻⁵)            h = 1 … H,  l = 0 … L−1

The paper is of how to compute this: in tiles, with the masked product inside a tile and the running
state between tiles, so that the cost of a token does not grow with the length. `ops.recurrence` does so
with its chunks. The slopes λ are ALiBi's; deeper layers forget less.

Cost: 2·n·d² multiply-adds a head, memory linear in n, one state of d × d a head while decoding.
Reduces to unnormalised linear attention with φ the identity at `slope_scale=0`.
Source: "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language
Models" and its authors' program, which has the slopes and their share by layer. There it is the core of
a layer that `transnormer-llm` is; here it stands between plain projections. The map of a bidirectional
layer decays both ways.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.positions import ALiBi


@mechanism("lightning-attention-2", aliases=("lightning-attention",))
class LightningAttention(RecurrentAttention):
    """Attention by products of queries and keys that decay with the distance.

    Args:
        layers: how many layers the model has, of which this is number `layer_idx`; unless given, all
            layers forget alike.
        slope_scale: a factor of all slopes; 0 forgets nothing.

    Raises:
        ValueError: a negative factor, or a layer that is none of `layers`.
    """

    normalized = False
    has_cross_form = False
    log_decay: Tensor

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, layers: int | None = None,
        slope_scale: float = 1.0, layer_idx: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        if slope_scale < 0:
            raise ValueError(f"slope_scale must be at least 0, got {slope_scale}")
        if layers is not None and not layer_idx < at_least_one("layers", layers):
            raise ValueError(f"layers must be more than layer_idx={layer_idx}, got {layers}")
        super().__init__(dim, heads, *args, layer_idx=layer_idx, **options)
        share = 1.0 if layers is None else 1.0 - layer_idx / max(layers - 1, 1) + 1e-5
        log_decay = -ALiBi(heads).slopes * (slope_scale * share)
        self.register_buffer("log_decay", log_decay, persistent=False)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are."""
        return q, k

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """A decay for each head."""
        return {"log_decay": self.log_decay}
