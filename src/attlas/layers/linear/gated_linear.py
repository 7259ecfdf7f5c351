"""Gated linear attention: every channel of the keys forgets at a rate that the token decides.

    S_t = diag(α_t) S_{t−1} + k_t v_tᵀ      y_t = S_tᵀ q_t / √d_k      α_t = σ(W_2 W_1 x_t)^{1/τ}
    y   = W_O ( swish(x W_G) ⊙ RMSNorm_h(heads) )

Keys are half as wide as values, W_1 goes down to 16 channels, and τ = 16 keeps the gates close to 1.

Cost: 2·n·d_k·d multiply-adds a head, memory linear in n, one state of d_k × d a head while decoding.
Reduces to unnormalised linear attention with φ the identity where all gates are open.
Source: "Gated Linear Attention Transformers with Hardware-Efficient Training". It stands here by itself
and as what "ReGLA: Refining Gated Linear Attention" refines.
"""

from __future__ import annotations

from dataclasses import replace

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option


@mechanism("gated-linear-attention", paper="", aliases=("gla",))
class GatedLinearAttention(RecurrentAttention):
    """Linear attention with a gate for every token and channel."""

    supports = replace(
        RecurrentAttention.supports, bidirectional=False, cross=False, position=False,
        masks="padding",
    )  # fmt: skip
    normalized = False

    key_dim: int = option(
        "width of a head's keys; half of head_dim unless given", at_least=1,
        factory=lambda layer: max(1, layer.head_dim // 2),
    )  # fmt: skip
    gate_rank: int = option(
        "width between the two maps that make the gates", default=16, at_least=1
    )
    gate_temper: float = option("τ, the root that is taken of the gates", default=16.0, above=0)

    def setup(self) -> None:
        """The gates of the state and of the output, each head's norm."""
        super().setup()
        self.scale = self.key_dim**-0.5
        self.decay_proj = nn.Sequential(
            nn.Linear(self.dim, self.gate_rank, bias=False),
            nn.Linear(self.gate_rank, self.kv_heads * self.key_dim),
        )
        self.gate_proj = nn.Linear(self.dim, self.heads * self.head_dim, bias=self.bias)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5)

    def make_projections(self) -> None:
        """Projections to narrow queries and keys."""
        super().make_projections()
        self.q_proj = nn.Linear(self.dim, self.heads * self.key_dim, bias=self.bias)
        self.k_proj = nn.Linear(self.dim, self.kv_heads * self.key_dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of their own width, and values."""
        x = inputs.x
        return (
            self.keyed(self.q_proj(x)),
            self.keyed(self.k_proj(x)),
            self.split_heads(self.v_proj(x)),
        )

    def keyed(self, x: Tensor) -> Tensor:
        """What stands side by side in each token, as heads of `key_dim` channels."""
        return rearrange(x, "b t (h d) -> b h t d", d=self.key_dim)

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """A decay for every token and channel."""
        return {"log_decay": logsigmoid(self.keyed(self.decay_proj(inputs.x))) / self.gate_temper}

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Every head normalised, then gated."""
        gate = self.split_heads(silu(self.gate_proj(inputs.x)))
        return super().output(self.norm(heads) * gate, inputs)
