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
from torch import Tensor

from attlas.bases.recurrent import WideValues
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs


@mechanism("efficient-attention")
class EfficientAttention(WideValues):
    """Attention through as many global contexts as keys have channels; bidirectional."""

    supports = replace(WideValues.supports, causal=False, masks="padding")
    normalized = False

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """ρ_q and ρ_k; padding has no share in any context."""
        if inputs.valid_now is not None:
            padding = ~inputs.valid_now[:, None, :, None]
            k = k.masked_fill(padding, torch.finfo(k.dtype).min)
        return q.softmax(-1), k.softmax(2)
