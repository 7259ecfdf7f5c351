"""Differential attention: subtract a second attention map to cancel noise.

    weights = softmax(q₁ k₁ᵀ/√d) − λ · softmax(q₂ k₂ᵀ/√d)
    λ = exp(λq₁·λk₁) − exp(λq₂·λk₂) + λ_init,   λ_init = 0.8 − 0.6 exp(−0.3 depth)
    y = W_O concat_h (1 − λ_init) · RMSNorm(weights_h v_h)

Cost: two maps of half the head width, with values twice as wide as the keys.
Reduces to softmax attention (then normalised) at λ = 0. Rows of the map sum to 1 − λ.
Source: "Differential Transformer". With grouped keys the authors' two programs differ: their fused
one gives both maps of a head the key heads of the same pair, as here; their plain one repeats single
key heads before pairing (`pairing="repeated"`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas.bases.sum_of_maps import SumOfMaps
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option
from attlas.supports import share_of_dim


@mechanism("differential-transformer", aliases=("differential",))
class Differential(SumOfMaps):
    """Attention by the difference of two maps; `heads` counts the differential heads."""

    claims = (
        Claim(
            "gives less weight to context that does not matter, and so retrieves better from noise",
            task="noise(needles=2, pairs=8, keys=8)", split="32 pairs",
        ),
    )  # fmt: skip

    beyond = ("project: each of the two maps has queries and keys of its own",)

    head_dim: int = option(
        "width of a map's queries and keys; dim / heads / 2 unless given", at_least=1,
        factory=lambda layer: share_of_dim(layer, 2), kw_only=False,
    )  # fmt: skip
    depth: int = option(
        "layers below this one, which sets λ_init; layer_idx unless given", at_least=0,
        factory=lambda layer: layer.layer_idx,
    )  # fmt: skip
    pairing: Literal["paired", "repeated"] = option(
        "which key heads a pair of maps reads when keys are grouped", default="paired"
    )

    def setup(self) -> None:
        """λ's parameters, and the norm of the heads."""
        super().setup()
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * self.depth)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(self.head_dim) * 0.1) for _ in range(4)
        )
        self.norm = nn.RMSNorm(2 * self.head_dim, eps=1e-5)

    def make_projections(self) -> None:
        """Projections to twice as many narrow query and key heads, and to twice as wide values."""
        width = 2 * self.head_dim
        self.q_proj = nn.Linear(self.dim, self.heads * width, bias=self.bias)
        self.k_proj = nn.Linear(self.dim, self.kv_heads * width, bias=self.bias)
        self.v_proj = nn.Linear(self.dim, self.kv_heads * width, bias=self.bias)
        self.o_proj = nn.Linear(self.heads * width, self.dim, bias=self.bias)

    @property
    def lambda_(self) -> Tensor:
        """λ, one number for all heads of the layer."""
        first = (self.lambda_q1 * self.lambda_k1).sum().exp()
        second = (self.lambda_q2 * self.lambda_k2).sum().exp()
        return first - second + self.lambda_init

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys in sub-heads, two for each head; values twice as wide."""
        q, k, v = super().project(inputs)
        return q, k, rearrange(v, "b (h two) t d -> b h t (two d)", two=2)

    def maps(self, q: Tensor, k: Tensor, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        """(q₁, k₁) and (q₂, k₂), each one map of every head."""
        if self.pairing == "repeated":
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        return [(q[:, 0::2], k[:, 0::2]), (q[:, 1::2], k[:, 1::2])]

    def coefficients(self, inputs: Inputs) -> Sequence[float | Tensor]:
        """1 and −λ."""
        return 1.0, -self.lambda_

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Each head normalised and scaled by 1 − λ_init before the projection."""
        return super().output(self.norm(heads) * (1 - self.lambda_init), inputs)
