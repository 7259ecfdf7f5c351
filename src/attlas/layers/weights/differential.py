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
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.masks import Mask


@mechanism("differential-transformer", aliases=("differential",))
class Differential(Attention):
    """Attention by the difference of two maps; `heads` counts the differential heads.

    Args:
        depth: layers below this one, which sets λ_init; `layer_idx` unless given.
        pairing: which key heads a pair of maps reads when keys are grouped.
    """

    claims = (
        Claim(
            "gives less weight to context that does not matter, and so retrieves better from noise",
            task="noise(needles=2, pairs=8, keys=8)", split="32 pairs",
        ),
    )

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, depth: int | None = None,
        pairing: Literal["paired", "repeated"] = "paired", **options: Any,
    ) -> None:  # fmt: skip
        if pairing not in ("paired", "repeated"):
            raise ValueError(f"pairing must be 'paired' or 'repeated', got {pairing!r}")
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if options.get("head_dim") is None and dim % (2 * heads):
            raise ValueError(f"heads must divide dim / 2 = {dim / 2:g}, got {heads}")
        options["head_dim"] = options.get("head_dim") or dim // heads // 2
        super().__init__(dim, heads, *args, **options)
        self.pairing = pairing
        depth = self.layer_idx if depth is None else depth
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(self.head_dim) * 0.1) for _ in range(4)
        )
        self.norm = nn.RMSNorm(2 * self.head_dim, eps=1e-5)

    def build(self, bias: bool) -> None:
        """Projections to twice as many narrow query and key heads, and to twice as wide values."""
        width = 2 * self.head_dim
        self.q_proj = nn.Linear(self.dim, self.heads * width, bias=bias)
        self.k_proj = nn.Linear(self.dim, self.kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(self.dim, self.kv_heads * width, bias=bias)
        self.o_proj = nn.Linear(self.heads * width, self.dim, bias=bias)

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

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Sub-heads turned; then a head's two keys side by side, as wide as its values in a cache."""
        q, k = super().position(q, k, inputs)
        return q, rearrange(k, "b (h two) t d -> b h t (two d)", two=2)

    def maps(self, q: Tensor, k: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(q₁, k₁) and (q₂, k₂), each one map of every head."""
        first, second = k.chunk(2, dim=-1)
        if self.pairing == "repeated" and self.kv_heads != self.heads:
            single = torch.stack((first, second), dim=2).flatten(1, 2)
            single = single.repeat_interleave(self.heads // self.kv_heads, dim=1)
            first, second = single[:, 0::2], single[:, 1::2]
        return (q[:, 0::2], first), (q[:, 1::2], second)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, inputs: Inputs
    ) -> Tensor:
        """What the first map gives, less λ times what the second gives."""
        if q.shape[2] == 1:  # for a lone query its weights are little to hold: the values are read once
            return self.aggregate(self.weigh(q, k, mask, inputs), v)
        first, second = self.outs(q, k, v, mask, inputs)
        return first - self.lambda_.to(first.dtype) * second

    def outs(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, inputs: Inputs
    ) -> tuple[Tensor, Tensor]:
        """What each map gives, [batch, heads, queries, 2 · head_dim], in fused calls."""
        if q.shape[2] > 1:
            first, second = (self.fused(*each, v, mask) for each in self.maps(q, k))
        else:
            first, second = (self.aggregate(w, v) for w in self.both(q, k, mask, inputs))
        return first, second

    def fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None) -> Tensor:
        """What one map gives."""
        # The fastest kernels of a GPU want values no wider than keys; elsewhere scoring twice is dear.
        halves = v.chunk(2, dim=-1) if v.is_cuda else (v,)
        return torch.cat([Attention.fused(self, q, k, half, mask) for half in halves], dim=-1)

    def weigh(
        self, q: Tensor, k: Tensor, mask: Mask | Tensor | None, inputs: Inputs
    ) -> Tensor:
        """The difference of the two maps, [batch, heads, queries, keys]."""
        first, second = self.both(q, k, mask, inputs)
        return first - self.lambda_.to(first.dtype) * second

    def both(
        self, q: Tensor, k: Tensor, mask: Mask | Tensor | None, inputs: Inputs
    ) -> tuple[Tensor, Tensor]:
        """The two maps."""
        first, second = (Attention.weigh(self, *each, mask, inputs) for each in self.maps(q, k))
        return first, second

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Each head normalised and scaled by 1 − λ_init before the projection."""
        return super().output(self.norm(heads) * (1 - self.lambda_init), inputs)
