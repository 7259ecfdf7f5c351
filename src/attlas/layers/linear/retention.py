"""Retention: linear attention that forgets at a fixed rate, another in every head.

    S_t = γ_h S_{t−1} + k_t v_tᵀ        y_t = S_tᵀ q_t / √d        γ_h = 1 − 2^(−5−h)
    y   = W_O ( swish(x W_G) ⊙ GroupNorm_h(heads) )

Cost: 2·n·d² multiply-adds a head, memory linear in n, one state of d × d a head while decoding.
Reduces to unnormalised linear attention with φ the identity at γ = 1.
Source: "Retentive Network: A Successor to Transformer for Large Language Models". Keys are scaled by
1/√d there, and values are twice as wide as keys, which is `value_dim`; its rotation is `position="rope"`.
The map of a bidirectional layer decays both ways.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from attlas.bases.recurrent import Gates, WideValues
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs


@mechanism("retention", paper="")
class Retention(WideValues):
    """Attention whose weights decay by a head's own factor for every token in between."""

    supports = replace(WideValues.supports, cross=False, counts=True)
    normalized = False

    def setup(self) -> None:
        """The gate, each head's norm and decay."""
        super().setup()
        self.scale = self.head_dim**-0.5
        self.gate_proj = nn.Linear(self.dim, self.heads * self.value_dim, bias=self.bias)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5, elementwise_affine=False)
        self.log_decay: Tensor
        self.hold("log_decay", lambda: _decays(self.heads))

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """A decay for each head."""
        return {"log_decay": self.log_decay.to(k.device)}

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Every head normalised, then gated."""
        gate = silu(self.gate_proj(inputs.x)).unflatten(-1, (-1, self.value_dim)).transpose(1, 2)
        return super().output(self.norm(heads) * gate, inputs)


def _decays(heads: int) -> Tensor:
    """log(1 − 2^(−5−h))."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64)))).float()
