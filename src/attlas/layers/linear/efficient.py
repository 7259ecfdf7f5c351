"""Efficient attention: softmax of queries over channels, of keys over positions, and two products.

    ρ_q(Q) = softmax_channels(Q)      ρ_k(K) = softmax_positions(K)      y = ρ_q(Q) (ρ_k(K)ᵀ V)

Each channel of the keys is a map over all positions that sums to 1 and gathers one vector of values, a
global context; a query is a mixture of those, so that the weights ρ_q ρ_kᵀ of a query sum to 1.

Cost: 2·n·d·d_v multiply-adds a head, memory linear in n: no matrix of pairs.
Reduces to no registered mechanism.
Source: "Efficient Attention: Attention with Linear Complexities". Its module has 1 × 1 convolutions,
which are these projections on [batch, height · width, dim], and adds its input to what it returns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas.bases.recurrent import RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option


@mechanism("efficient-attention")
class EfficientAttention(RecurrentAttention):
    """Attention through as many global contexts as keys have channels; bidirectional."""

    supports = replace(RecurrentAttention.supports, causal=False, masks="padding")
    beyond = ("project: the published module lets values have a width of their own",)
    normalized = False

    value_dim: int = option(
        "width of a head's values; head_dim unless given", at_least=1,
        factory=lambda layer: layer.head_dim,
    )  # fmt: skip

    def make_projections(self) -> None:
        """Projections, those of values of their own width."""
        super().make_projections()
        self.v_proj = nn.Linear(self.dim, self.kv_heads * self.value_dim, bias=self.bias)
        self.o_proj = nn.Linear(self.heads * self.value_dim, self.dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of their own width."""
        v = rearrange(self.v_proj(inputs.tokens), "b t (h d) -> b h t d", d=self.value_dim)
        return (
            self.split_heads(self.q_proj(inputs.x)),
            self.split_heads(self.k_proj(inputs.tokens)),
            v,
        )

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """ρ_q and ρ_k; padding has no share in any context."""
        if inputs.valid_now is not None:
            padding = ~inputs.valid_now[:, None, :, None]
            k = k.masked_fill(padding, torch.finfo(k.dtype).min)
        return q.softmax(-1), k.softmax(2)
