"""TransNormerLLM's attention: lightning attention with rotated positions, a norm for a divisor, a gate.

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

from dataclasses import replace
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn.functional import silu

from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.layers.linear.lightning import log_decays
from attlas.options import option


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
class TransNormer(RecurrentAttention):
    """Gated linear attention with a decay per head, LRPE and a simple RMS norm."""

    supports = replace(RecurrentAttention.supports, cross=False, position=False, counts=True)
    changes = ("score",)  # products without a softmax, of a SiLU's queries and keys
    normalized = False

    layers: int | None = option(
        "layers of the model, of which this is number layer_idx; unless given, all forget alike",
        default=None, at_least=1,
    )  # fmt: skip
    slope_scale: float = option("factor of all slopes; 0 forgets nothing", default=1.0, at_least=0)
    rotates: bool = option(
        "whether LRPE rotates queries and keys; in the first layer alone unless given",
        factory=lambda layer: layer.layer_idx == 0, alias="lrpe",
    )  # fmt: skip
    norm_eps: float = option("added in the norm", default=1e-6, at_least=0, alias="eps")

    def setup(self) -> None:
        """The gate, the norm of all heads together, frequencies and decays."""
        super().setup()
        self.gate_proj = nn.Linear(self.dim, self.heads * self.head_dim, bias=self.bias)
        self.lrpe = LRPE(self.kv_heads, self.head_dim) if self.rotates else None
        self.norm = self.make_norm(self.heads * self.head_dim)
        self.log_decay: Tensor
        decays = partial(log_decays, self.heads, self.layer_idx, self.layers)
        self.hold("log_decay", lambda: decays() * self.slope_scale)

    def make_norm(self, width: int) -> nn.Module:
        """The norm of all heads together; simple, since nothing in it is trained."""
        return nn.RMSNorm(width, eps=self.norm_eps, elementwise_affine=False)

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys through SiLU, then rotated where this layer does so."""
        q, k = silu(q), silu(k)
        if self.lrpe is None:
            return q, k
        return self.lrpe(q, inputs.positions), self.lrpe(k, inputs.token_positions)

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """A decay for each head."""
        return {"log_decay": self.log_decay.to(k.device)}

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

    beyond = ("project: values go through a SiLU in the authors' later example",)

    rotates: bool = option("whether LRPE rotates queries and keys", default=False, alias="lrpe")
    norm_eps: float = option("added in the norm", default=1e-5, at_least=0, alias="eps")

    def make_norm(self, width: int) -> nn.Module:
        """A LayerNorm of all heads together."""
        return nn.LayerNorm(width, eps=self.norm_eps)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the latter through SiLU as the others will be."""
        q, k, v = super().project(inputs)
        return q, k, silu(v)

    def gate(self, x: Tensor) -> Tensor:
        """Shares between 0 and 1."""
        return super().gate(x).sigmoid()
