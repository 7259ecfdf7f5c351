"""ComplexFormer: heads that score by the phases of complex queries and keys, adapted by each head.

    q_i = r e^{iφ}: halves of a head's vector are real and imaginary parts, i = 1 … d/2
    score[m, n] = Σ_i r_q[m,i] r_k[n,i] cos(δ_i (φ_q[m,i] − φ_k[n,i]) + b_i + (m − n) g_i)
    weights = softmax(score)          without 1/√d

A cosine of a difference is a product of two rotated vectors, so that the score is the plain product of
q' = r_q e^{i(δφ_q + b + m g)} and k' = r_k e^{i(δφ_k + n g)}. Keys are cached in this form.

Cost: that of rotary attention, and an arctangent and a sine pair for each number of q and k.
Reduces to rotary attention without 1/√d at δ = 1 and b = 0.
Source: "ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex
Vector Attention", whose code has no grouped keys: here the heads of a group share δ, as they share
their keys, and keep a b each. That code also rounds g to bfloat16, which is not done here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.ops.fused import fused
from attlas.options import option
from attlas.positions import Position


def _leave_phases(layer: Attention, plain: Attention) -> None:
    nn.init.ones_(layer.get_parameter("delta"))
    nn.init.zeros_(layer.get_parameter("phase_bias"))
    plain.load_state_dict(layer.state_dict(), strict=False)
    plain.position_encoding, plain.scale = layer.position_encoding, 1.0


@mechanism("complexformer", reduces_to=Reduction("softmax", {"eps": 0.0}, _leave_phases))
class ComplexFormer(Attention):
    """Attention by moduli and adapted phases."""

    claims = (
        Claim(
            "phases adapted by each head model language better than rotary heads",
            task="shakespeare-bytes", better="lower", steps=500, batch=16,
        ),
    )  # fmt: skip

    changes = ("score",)  # the product of the adapted vectors, which `position` makes

    own_position: Position | str | None = option(
        "rotates the vectors further by g; the paper's rotary positions unless given",
        default="rope", alias="position",
    )  # fmt: skip
    eps: float = option(
        "under the root of the modulus, so that it has a gradient at 0", default=1e-9, at_least=0
    )

    def setup(self) -> None:
        """Projections begun as the paper begins them, δ and b."""
        super().setup()
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(projection.weight)
        self.scale = 1.0
        pairs = self.head_dim // 2
        self.delta = nn.Parameter(torch.randn(self.kv_heads, pairs) * pairs**-0.5)
        self.phase_bias = nn.Parameter(torch.zeros(self.heads, pairs))

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Phases adapted, then rotated by the positions."""
        delta = self.delta.repeat_interleave(self.heads // self.kv_heads, dim=0)
        q = self.adapted(q, delta, self.phase_bias)
        return super().position(q, self.adapted(k, self.delta), inputs)

    def adapted(self, x: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
        """r e^{iφ} of every head → r e^{i(δφ + b)}."""
        bias = torch.zeros_like(delta) if bias is None else bias
        return _adapted(x, delta[:, None], bias[:, None], self.eps)


@fused
def _adapted(x: Tensor, delta: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)  # half precision is too coarse an angle
    real, imaginary = x.to(dtype).chunk(2, dim=-1)
    modulus = (real.square() + imaginary.square() + eps).sqrt()
    phase = delta.to(dtype) * torch.atan2(imaginary, real) + bias.to(dtype)
    return torch.cat((modulus * phase.cos(), modulus * phase.sin()), dim=-1).to(x.dtype)
