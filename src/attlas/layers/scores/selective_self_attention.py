"""Selective self-attention (SSA): queries set how sharply they look, values how much they say.

    weights_i = softmax(τ_q(x_i, i) · q_i kᵀ / √d),   out_i = Σ_j weights_ij τ_v(x_j) v_j
    τ_q(x, i) = tanh(f_q(x)) + 1 + a ln i,            τ_v(x) = tanh(f_v(x)) + 1
    f_q(x) = w_q · GELU(q),   f_v(x) = w_v · GELU(v),   a = exp(−exp β),   i = 1, 2, …

ln i makes up for what softmax flattens as a row grows. The small networks f share their first layer
with the projections, so that a layer has 2·dim + 1 new parameters, and a pretrained one starts as it was
but for a = 0.011.

Cost: that of plain attention; queries and values are scaled before the fused call.
Reduces to softmax attention at w_q = w_v = 0 and β → ∞.
Source: "Selective Attention: Enhancing Transformer through Principled Context Control". The position
term is the released code's, one β a layer that starts at 1.5 (the paper writes σ(α)). The token terms
were not released: tanh(f), its sum with the position term, and weights shared with the projections are
as the paper is told by others; that f has a GELU and an output for each head is ours, and so is the 1
of τ_v, without which values could not start as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs


def _without_temperatures(layer: Attention, plain: Attention) -> None:
    nn.init.zeros_(layer.get_parameter("query_gate"))
    nn.init.zeros_(layer.get_parameter("value_gate"))
    nn.init.constant_(layer.get_parameter("beta"), 10.0)  # exp(−e¹⁰) is 0
    plain.load_state_dict(layer.state_dict(), strict=False)


@mechanism("selective-self-attention", aliases=("ssa",),
           reduces_to=Reduction("softmax", {}, _without_temperatures))  # fmt: skip
class SelectiveSelfAttention(Attention):
    """Attention with a temperature for every query and value; it has no options of its own."""

    changes = ("score", "aggregate")
    beyond = ("project: temperatures multiply queries and values as soon as they are projected",)

    def setup(self) -> None:
        """β, and the small networks' second layers."""
        super().setup()
        self.beta = nn.Parameter(torch.tensor(1.5))
        self.query_gate = nn.Parameter(torch.zeros(self.heads, self.head_dim))
        self.value_gate = nn.Parameter(torch.zeros(self.kv_heads, self.head_dim))

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and values at their temperatures; a cache holds the values so."""
        q, k, v = super().project(inputs)
        v = v * (1 + gated(v, self.value_gate))
        return q * self.query_temperature(q, inputs.positions), k, v

    def query_temperature(self, q: Tensor, positions: Tensor) -> Tensor:
        """τ_q [batch, heads, tokens, 1], the number that multiplies a query's logits."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        strength = torch.exp(-torch.exp(self.beta.to(dtype)))
        grown = strength * (positions + 1).to(dtype).log()[..., None, :, None]
        return gated(q, self.query_gate) + (1 + grown).to(q.dtype)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """tanh(w · GELU(x)) of every head's vector, [batch, heads, tokens, 1]."""
    return (gelu(x) * gate[:, None]).sum(-1, keepdim=True).tanh()
