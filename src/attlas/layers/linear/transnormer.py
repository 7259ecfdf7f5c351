"""TransNormerLLM's attention: lightning attention with turning positions, a norm for a divisor, a gate.

    q, k = silu(x W_Q), silu(x W_K)         v = x W_V         u = x W_U
    y    = W_O ( u ⊙ SRMSNorm( concat_h Σ_{s≤t} e^{−λ_h (t−s)} ⟨q_t, k_s⟩_{t−s} v_s ) )
    ⟨q, k⟩_τ = Σ_c q_c k_c cos(θ_c τ)                         SRMSNorm(z) = √d z / ‖z‖₂

LRPE, the position, is Re Σ_c q_c k_c e^{iθ_c τ} and so linear: a channel is a pair (x cos θt, x sin θt).
Its θ are trained from 10000^{−2c/d} on, c over the channels of all heads, in the first layer alone; the
other layers know positions by their decays λ_h, which are lightning attention's.

Cost: 2·n·d² multiply-adds a head, twice that with LRPE, memory linear in n.
Reduces to no registered mechanism; between its features and its norm it is lightning attention.
Source: "Scaling TransNormer to 175 Billion Parameters" and its authors' programs, which have θ, the share
of λ by layer and the norm's ε. Their later example of the layer is `tnl-attention`: a sigmoid on the
gate, SiLU on values too, a LayerNorm, no LRPE; its gate of two linears in a row is one linear here.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn.functional import silu

from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.layers.linear.lightning import LightningAttention


class LRPE(nn.Module):
    """Linearised relative positions: trained frequencies, one for every channel of every head.

    Args:
        heads: heads of what is rotated.
        head_dim: their width.
        base: of the frequencies at the beginning.
    """

    def __init__(self, heads: int, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        channels = torch.arange(heads * head_dim).reshape(heads, 1, head_dim)
        self.theta = nn.Parameter(base ** (-2.0 / (heads * head_dim) * channels))

    def forward(
        self,
        x: Float[Tensor, "batch heads tokens dim"],
        positions: Integer[Tensor, "*batch tokens"],
    ) -> Float[Tensor, "batch heads tokens 2*dim"]:
        """Every channel times the cosine and the sine of its angle."""
        # The query heads of a group share their key head's frequencies, or products were not relative.
        theta = self.theta.repeat_interleave(x.shape[1] // len(self.theta), dim=0)
        theta = theta.to(torch.promote_types(x.dtype, torch.float32))
        angles = positions[..., None, :, None] * theta
        return torch.cat((x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)), dim=-1)


@mechanism("transnormer-llm", aliases=("transnormer",))
class TransNormer(LightningAttention):
    """Gated linear attention with a decay per head, LRPE and a simple RMS norm.

    Args:
        lrpe: whether this layer turns its queries and keys; the first one does unless given.
        eps: of the norm.
    """

    has_own_position = True

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, lrpe: bool | None = None, eps: float = 1e-6,
        layer_idx: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        self.turns, self.eps_norm = layer_idx == 0 if lrpe is None else lrpe, eps
        super().__init__(dim, heads, *args, layer_idx=layer_idx, **options)

    def make_projections(self) -> None:
        """Projections, the gate's, the norm and the frequencies."""
        super().make_projections()
        self.gate_proj = nn.Linear(self.dim, self.heads * self.head_dim, bias=self.bias)
        self.lrpe = LRPE(self.kv_heads, self.head_dim) if self.turns else None
        self.norm = self.make_norm(self.heads * self.head_dim)

    def make_norm(self, width: int) -> nn.Module:
        """The norm of all heads together; simple, since nothing in it is trained."""
        return nn.RMSNorm(width, eps=self.eps_norm, elementwise_affine=False)

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys through SiLU, then turned where this layer does so."""
        q, k = silu(q), silu(k)
        if self.lrpe is None:
            return q, k
        return self.lrpe(q, inputs.positions), self.lrpe(k, inputs.token_positions)

    def gate(self, x: Tensor) -> Tensor:
        """What the normalised heads are multiplied by; linear in x."""
        u: Tensor = self.gate_proj(x)
        return u

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads joined, normalised together, gated and projected."""
        joined = self.norm(rearrange(heads, "b h t d -> b t (h d)"))
        y: Tensor = self.o_proj(joined * self.gate(inputs.x))
        return y


@mechanism("tnl-attention", paper="transnormer-llm")
class TNLAttention(TransNormer):
    """The layer of the authors' later example: sigmoid gate, SiLU on values, LayerNorm, no LRPE."""

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *args: Any,
        lrpe: bool = False,
        eps: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, *args, lrpe=lrpe, eps=eps, **options)

    def make_norm(self, width: int) -> nn.Module:
        """A LayerNorm of all heads together."""
        return nn.LayerNorm(width, eps=self.eps_norm)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the latter through SiLU as the others will be."""
        q, k, v = super().project(inputs)
        return q, k, silu(v)

    def gate(self, x: Tensor) -> Tensor:
        """Shares between 0 and 1."""
        return super().gate(x).sigmoid()
