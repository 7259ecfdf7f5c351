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

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.bases.recurrent import RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option


@mechanism("hedgehog")
class Hedgehog(RecurrentAttention):
    """Linear attention by learned features of exponentials."""

    activation: Literal["softmax", "exp"] = option(
        "what makes features of u: a softmax over the features, or exp", default="softmax"
    )
    negated: bool = option("whether the features of −u stand beside those of u", default=True)
    feature_dim: int = option(
        "width of u; head_dim unless given", factory=lambda layer: layer.head_dim, at_least=1
    )
    feature_bias: bool = option("whether u has a bias", default=True)
    eps: float = option(
        "least feature, and added to the sum that divides", default=1e-12, at_least=0
    )

    def setup(self) -> None:
        """The maps of every head, which start at the identity."""
        super().setup()
        start = torch.eye(self.head_dim, self.feature_dim)
        shift = torch.zeros(1, self.feature_dim)
        self.q_map = nn.Parameter(start.repeat(self.heads, 1, 1))
        self.k_map = nn.Parameter(start.repeat(self.kv_heads, 1, 1))
        if self.feature_bias:
            self.q_map_bias = nn.Parameter(shift.repeat(self.heads, 1, 1))
            self.k_map_bias = nn.Parameter(shift.repeat(self.kv_heads, 1, 1))

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
