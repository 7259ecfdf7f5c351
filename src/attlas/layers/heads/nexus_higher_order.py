"""Nexus: queries and keys are results of attention themselves, so that a score knows many tokens.

    Q⁰ = x W_Q,   Qˡ = softmax(Qˡ⁻¹ Qˡ⁻¹ᵀ / √d) Qˡ⁻¹          K⁰ = x W_K,   Kˡ likewise
    y  = W_O softmax(Qᵐ Kᵐᵀ / √d) x W_V

Inner attention sees what the outer one sees (causal where that is) and is rotated by the same rotary
positions; a bias on scores, and dropout, fall on the outer weights alone.

Cost: at depth m, m more attention passes for queries and as many for keys, fused, and no parameter.
A cache holds Qˡ and Kˡ for l < m besides keys and values.
Reduces to softmax attention at depth 0.
Source: "Nexus: Higher-Order Attention Mechanisms in Transformers". No program of the authors was
found. That all passes share W_Q and W_K rests on reports of the paper's shared variant, and the inner
formulas, with W_Q (W_K) in all three places, on one reader's note of its text; how positions and
masks enter the inner passes is our choice. The paper's order counts the outer pass: depth + 1.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, cat

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports


@mechanism("nexus-higher-order", aliases=("nexus",), reduces_to=Reduction(
    "softmax", {"depth": 0}, lambda nexus, plain: plain.load_state_dict(nexus.state_dict())
))  # fmt: skip
class NexusHigherOrder(Attention):
    """Attention between queries and keys that attended before."""

    supports = Supports(cross=False, remembers=True)
    expected_failures: ClassVar[dict[str, str]] = {
        "static-cache": "the inner passes' queries and keys have no room in it"
    }

    depth: int = option("inner attention passes, m", default=1, at_least=0)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after the inner passes, and values."""
        q, k, v = super().project(inputs)
        for level in range(self.depth):
            q = self.inner(q, f"queries {level}", inputs)
            k = self.inner(k, f"keys {level}", inputs)
        return q, k, v

    def inner(self, x: Tensor, name: str, inputs: Inputs) -> Tensor:
        """Attention of x to x and to what was remembered of it, which are the values too."""
        past = inputs.recall(name)
        every = x if past is None else cat((past, x), dim=2)
        inputs.remember(name, every)
        rotate = self.position_encoding.rotate
        return ops.attend(
            rotate(x, inputs.positions), rotate(every, inputs.positions_of(every.shape[2])), every,
            mask=self.mask(x, every, inputs), scale=self.scale,
        )  # fmt: skip
