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

from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.bases.recurrent import Gates, RecurrentAttention


@mechanism("gated-linear-attention", paper="", aliases=("gla",))
class GatedLinearAttention(RecurrentAttention):
    """Linear attention with a gate for every token and channel.

    Args:
        key_dim: width of a head's keys; half of `head_dim` unless given.
        gate_rank: width between the two maps that make the gates.
        gate_temper: τ, the root that is taken of the gates.

    Raises:
        ValueError: a width or a rank below 1, or a τ that is not positive.
    """

    normalized = False
    has_two_sided_form = False
    has_cross_form = False
    has_own_position = True
    takes_masks = "padding"

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, key_dim: int | None = None, gate_rank: int = 16,
        gate_temper: float = 16.0, **options: Any,
    ) -> None:  # fmt: skip
        if not gate_temper > 0:
            raise ValueError(f"gate_temper must be above 0, got {gate_temper}")
        self.key_dim = None if key_dim is None else at_least_one("key_dim", key_dim)
        self.gate_rank, self.gate_temper = at_least_one("gate_rank", gate_rank), gate_temper
        super().__init__(dim, heads, *args, **options)
        assert self.key_dim is not None
        self.scale = self.key_dim**-0.5

    def make_projections(self) -> None:
        """Projections, the gates of the state and of the output, each head's norm."""
        super().make_projections()
        self.key_dim = max(1, self.head_dim // 2) if self.key_dim is None else self.key_dim
        self.q_proj = nn.Linear(self.dim, self.heads * self.key_dim, bias=self.bias)
        self.k_proj = nn.Linear(self.dim, self.kv_heads * self.key_dim, bias=self.bias)
        self.decay_proj = nn.Sequential(
            nn.Linear(self.dim, self.gate_rank, bias=False),
            nn.Linear(self.gate_rank, self.kv_heads * self.key_dim),
        )
        self.gate_proj = nn.Linear(self.dim, self.heads * self.head_dim, bias=self.bias)
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5)

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

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are."""
        return q, k

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """A decay for every token and channel."""
        return {"log_decay": logsigmoid(self.keyed(self.decay_proj(inputs.x))) / self.gate_temper}

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Every head normalised, then gated."""
        gate = self.split_heads(silu(self.gate_proj(inputs.x)))
        return super().output(self.norm(heads) * gate, inputs)
