"""Lightning attention: linear attention without features or divisor, that forgets at a rate per head.

    y_t = Σ_{s≤t} e^{−λ_h (t−s)} (q_t·k_s) v_s      S_t = e^{−λ_h} S_{t−1} + k_t v_tᵀ     y_t = S_tᵀ q_t
    λ_h = 2^{−8h/H} · (1 − l/(L−1) + 10⁻⁵)            h = 1 … H,  l = 0 … L−1

The paper is of how to compute this: in tiles, with the masked product inside a tile and the running
state between tiles, so that the cost of a token does not grow with the length. `ops.recurrence` does so
with its chunks. The slopes λ are ALiBi's; deeper layers forget less.

Cost: 2·n·d² multiply-adds a head, memory linear in n, one state of d × d_v a head while decoding.
Reduces to unnormalised linear attention with φ the identity at `slope_scale=0`.
Source: "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language
Models" and its authors' program, which has the slopes and their share by layer. There it is the core of
a layer that `transnormer-llm` is; here it stands between plain projections. The map of a bidirectional
layer decays both ways.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from attlas.bases.recurrent import Gates, WideValues
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.options import option
from attlas.positions.bias import slopes


@mechanism("lightning-attention-2", aliases=("lightning-attention",))
class LightningAttention(WideValues):
    """Attention by products of queries and keys that decay with the distance."""

    supports = replace(WideValues.supports, cross=False, counts=True)
    normalized = False

    layers: int | None = option(
        "layers of the model, of which this is number layer_idx; unless given, all forget alike",
        default=None, at_least=1,
    )  # fmt: skip
    slope_scale: float = option("factor of all slopes; 0 forgets nothing", default=1.0, at_least=0)

    def setup(self) -> None:
        """The decays."""
        super().setup()
        self.log_decay: Tensor
        decays = partial(log_decays, self.heads, self.layer_idx, self.layers)
        self.hold("log_decay", lambda: decays() * self.slope_scale)

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """A decay for each head."""
        return {"log_decay": self.log_decay.to(k.device)}


def log_decays(heads: int, layer_idx: int, layers: int | None) -> Float[Tensor, " heads"]:
    """−λ of every head of a layer; λ of the first layer where the model's `layers` are not told.

    Raises:
        ValueError: a layer that is none of `layers`.
    """
    decays = -torch.tensor(slopes(heads), dtype=torch.float32)
    if layers is None:
        return decays
    if layer_idx >= layers:
        raise UserError(f"layers must be more than layer_idx={layer_idx}, got {layers}")
    return decays * (1.0 - layer_idx / max(layers - 1, 1) + 1e-5)
