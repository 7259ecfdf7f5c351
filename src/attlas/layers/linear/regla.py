"""ReGLA: gated linear attention with bounded features, a norm for a divisor, and gates that stay alive.

    φ_q(q) = exp(q − max_d q)        φ_k(k_s) = exp(k_s − max_{d,s} k)
    g = σ(W_g x)     r = σ(W_r x)    F = (1 − r) g² + r (1 − (1 − g)²)
    S_t = diag(F_t) S_{t−1} + φ_k(k_t) v_tᵀ        y_t = Norm( S_tᵀ φ_q(q_t) / (e √(d (e² − 1))) )

A sigmoid near 0 or 1 has no gradient; ∂F/∂g = 2 (1 − r) g + 2 r (1 − g) has one there. r = ½ gives F = g.
The constant brings the variance of φ_q·φ_k of Gaussian channels to 1.

The maximum over all positions cancels in the norm; here it is that of the positions so far.

Cost: 2·n·d² multiply-adds a head, memory linear in n, one state of d × d a head while decoding.
Reduces to no registered mechanism.
Source: "ReGLA: Refining Gated Linear Attention", whose code is not public. The equations are from a
digest of the paper; that the gates stand at the channels of the keys, as in gated linear attention, that
the norm is a LayerNorm of each head, and that the layer has no output gate, is how they are read here.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from attlas.bases.exponential_keys import ExponentialKeys
from attlas.bases.recurrent import Gates
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs


@mechanism("regla")
class ReGLA(ExponentialKeys):
    """Linear attention with refined gates over bounded exponential features."""

    supports = replace(ExponentialKeys.supports, bidirectional=False, cross=False)
    beyond = ("output: the norm that stands for the divisor is a LayerNorm of each head",)
    normalized = False

    def setup(self) -> None:
        """The gate and what refines it, and each head's norm."""
        super().setup()
        self.gate_proj = nn.Linear(self.dim, self.kv_heads * self.head_dim)
        self.refine_proj = nn.Linear(self.dim, self.kv_heads * self.head_dim)
        self.norm = nn.LayerNorm(self.head_dim)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """φ of queries, and logarithms of those of keys."""
        return (q - q.amax(-1, keepdim=True)).exp() * variance_scale(self.head_dim), k

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """The refined gate of every token and channel."""
        gate, refine = (self.split_heads(p(inputs.x)) for p in (self.gate_proj, self.refine_proj))
        return {"log_decay": refined(gate, refine)}

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Every head normalised."""
        return super().output(self.norm(heads), inputs)


def variance_scale(width: int) -> float:
    """1 / (e √(d (e² − 1))), one over the deviation of Σ e^{x + y} for Gaussian x and y."""
    return 1.0 / (math.e * math.sqrt(width * (math.e**2 - 1.0)))


def refined(gate: Tensor, refine: Tensor) -> Tensor:
    """log F from what the two sigmoids take, at most 0: F = g (g + 2 r (1 − g))."""
    g, r = gate.sigmoid(), refine.sigmoid()
    rest = (g + 2 * r * (1 - g)).clamp(min=torch.finfo(g.dtype).tiny)
    return (logsigmoid(gate) + rest.log()).clamp(max=0.0)
