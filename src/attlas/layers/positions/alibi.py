"""ALiBi: no position vectors; scores fall linearly with distance.

    weights = softmax(q kᵀ / √d − m_h · |i − j|),   m_h = 2^(−8h/H) for H a power of two

Cost: that of plain attention; the change is a `score_mod`, fused on a GPU.
Reduces to softmax attention without positions when the slopes are 0.
Source: "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation".
"""

from __future__ import annotations

from typing import Any

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.positions import ALiBi
from attlas.supports import Supports


def _flatten_slopes(layer: Any, plain: Attention) -> None:
    layer.position_encoding.slopes.zero_()
    plain.load_state_dict(layer.state_dict())


@mechanism("alibi", paper="", reduces_to=Reduction("softmax", {}, _flatten_slopes))
class ALiBiAttention(Attention):
    """Softmax attention with ALiBi's slopes; other position encodings are refused."""

    supports = Supports(cross=False, position=False)
    changes = ("position", "score")

    def setup(self) -> None:
        """The slopes."""
        super().setup()
        self.position_encoding = ALiBi(self.heads)
