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

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.bases.recurrent import Gates, RecurrentAttention


@mechanism("efficient-attention")
class EfficientAttention(RecurrentAttention):
    """Attention through as many global contexts as keys have channels; bidirectional.

    Args:
        value_dim: width of a head's values; `head_dim` unless given.
    """

    normalized = False
    has_causal_form = False
    takes_masks = "padding"

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, value_dim: int | None = None, **options: Any
    ) -> None:
        self.value_dim = None if value_dim is None else at_least_one("value_dim", value_dim)
        super().__init__(dim, heads, *args, **options)

    def make_projections(self) -> None:
        """Projections, those of values of their own width."""
        super().make_projections()
        self.value_dim = self.head_dim if self.value_dim is None else self.value_dim
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
        """ρ of queries; that of keys needs to know the padding."""
        return q.softmax(-1), k

    def terms(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Gates]:
        """ρ of both; padding has no share in any context."""
        q, k = self.features(q, k, inputs)
        k, valid = ops.repeated(k, q.shape[1]), inputs.valid_now
        if valid is None:
            return q, k.softmax(2), {}
        padding = ~valid[:, None, :, None]
        shares = k.masked_fill(padding, torch.finfo(k.dtype).min).softmax(2)
        return q, shares.masked_fill(padding, 0.0), {}
