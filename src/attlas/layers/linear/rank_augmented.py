"""Rank-augmented linear attention: keys weighed before they are summed, outputs times a map of the input.

    α_j = n · softmax_j( q̄·φ(k_j) / √d )        q̄ = mean_i φ(q_i)        φ(x) = elu(x) + 1
    weights_ij = R(φ(q_i))·R(α_j φ(k_j)) / Σ_r φ(q_i)·α_r φ(k_r)
    y = W_O ( (concat_h weights_h v_h + DWC(v)) ⊙ (x W_G) )

Without α the sum Σ_j φ(k_j) v_jᵀ tends to few directions; the factor x W_G mixes what a head's d × d
buffer gives with every token's own input, so that outputs span more than d of them. R rotates half of a
head's channels by the row and half by the column; the divisor takes features that are not rotated.

Cost: 2·n·d² multiply-adds a head and n·dim·kernel², memory linear in n.
Reduces to linear attention at α = 1 and a gate of 1, without rotation and convolution.
Source: "Breaking the Low-Rank Dilemma of Linear Attention" and its authors' program, which has ε beside
the mean product that divides, the rotation, a gate without an activation, and the initialisation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attlas import ops
from attlas.bases.grid import GatedOnGrid, start_small
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs


def _plain(layer: Any, other: Any) -> None:
    """α = 1 and a gate of 1."""
    other.load_from(layer.state_dict())
    layer.alpha_scale = 0.0
    nn.init.zeros_(layer.gate_proj.weight)
    nn.init.ones_(layer.gate_proj.bias)


@mechanism(
    "rank-augmented-linear-attention", aliases=("rala",),
    reduces_to=Reduction(
        "linear-attention", {"kernel_size": None, "rotary": False, "eps": 0.0}, _plain
    ),
)  # fmt: skip
class RankAugmentedLinear(GatedOnGrid):
    """Linear attention with weighed keys and gated outputs."""

    def setup(self) -> None:
        """Projections that begin small."""
        super().setup()
        self.alpha_scale = self.head_dim**-0.5
        start_small(self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.o_proj)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries over their divisor, and weighed keys of every query head."""
        q, k = super().features(q, k, inputs)
        k = ops.repeated(k, q.shape[1])
        k = k * self.alpha(q, k)
        divisor = self.mean_product(q, k) + self.eps
        return self.rotated(q) / divisor, self.rotated(k) / k.shape[2]

    def alpha(self, q: Tensor, k: Tensor) -> Tensor:
        """What every key counts, [batch, heads, keys, 1], on average 1; q and k are features."""
        shares: Tensor = (self.mean_product(k, q) * self.alpha_scale).softmax(2)
        return shares * k.shape[2]
