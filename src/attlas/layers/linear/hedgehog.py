"""Hedgehog: linear attention whose feature map is learned, and starts close to a softmax's spikes.

    u = W_h x + b_h          one map for the queries and one for the keys of every head, W_h = I at first
    φ(x) = [ softmax(u), softmax(−u) ]        or  [ exp(u − max u), exp(−u + min u) ]
    weights_ts = φ_q(q_t)·φ_k(k_s) / Σ_r φ_q(q_t)·φ_k(k_r)

Exponentials make low-entropy weights that grow with q·k, as a softmax does; the negated half keeps what
opposite channels share. Trained from scratch or distilled from the softmax weights of a model.

Cost: 4·n·d² multiply-adds a head, as features are twice as wide, and n·d² for each map;
memory linear in n.
Reduces to no registered mechanism.
Source: "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry" and its authors'
later program. The paper writes exp(±u) alone, which overflows: as in the program each half is divided by
its largest feature, or its sum, and no feature is below ε. The program has one bias a head, here there is
one a feature; with grouped keys there is one map for each key head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.bases.recurrent import RecurrentAttention


@mechanism("hedgehog")
class Hedgehog(RecurrentAttention):
    """Linear attention by learned features of exponentials.

    Args:
        activation: what makes features of u, "softmax" over the features or "exp".
        negated: whether the features of −u stand beside those of u.
        feature_dim: width of u; `head_dim` unless given.
        feature_bias: whether u has a bias.
        eps: least feature, and added to the sum that divides.

    Raises:
        ValueError: another activation, a width below 1, or an ε below 0.
    """

    q_map: Tensor
    k_map: Tensor
    q_map_bias: Tensor
    k_map_bias: Tensor

    def __init__(
        self, dim: int, heads: int = 8, *args: Any,
        activation: Literal["softmax", "exp"] = "softmax", negated: bool = True,
        feature_dim: int | None = None, feature_bias: bool = True, eps: float = 1e-12,
        **options: Any,
    ) -> None:  # fmt: skip
        if activation not in ("softmax", "exp"):
            raise ValueError(f"activation must be 'softmax' or 'exp', got {activation!r}")
        if eps < 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        self.activation, self.negated, self.feature_bias = activation, negated, feature_bias
        self.feature_dim = None if feature_dim is None else at_least_one("feature_dim", feature_dim)
        super().__init__(dim, heads, *args, **options)
        self.eps = eps

    def make_projections(self) -> None:
        """Projections, and the maps of every head, which start at the identity."""
        super().make_projections()
        width = self.feature_dim or self.head_dim
        for name, heads in (("q", self.heads), ("k", self.kv_heads)):
            start = torch.eye(self.head_dim, width).repeat(heads, 1, 1)
            self.register_parameter(f"{name}_map", nn.Parameter(start))
            shift = nn.Parameter(torch.zeros(heads, 1, width)) if self.feature_bias else None
            self.register_parameter(f"{name}_map_bias", shift)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """φ of queries and keys, each by the map of its head."""
        q, k = q @ self.q_map, k @ self.k_map
        if self.feature_bias:
            q, k = q + self.q_map_bias, k + self.k_map_bias
        return self.activated(q), self.activated(k)

    def activated(
        self, u: Float[Tensor, "batch heads tokens width"]
    ) -> Float[Tensor, "batch heads tokens features"]:
        """Features of what the maps gave, none below ε."""
        signed = (u, -u) if self.negated else (u,)
        if self.activation == "softmax":
            halves = [each.softmax(-1) for each in signed]
        else:
            halves = [(each - each.amax(-1, keepdim=True)).exp() for each in signed]
        return torch.cat(halves, dim=-1).clamp(min=self.eps)
