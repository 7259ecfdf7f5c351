"""Norm-aware linear attention: the longer a query, the sharper its features.

    φ_q(q) = [ (q/|q|)₊^p, (−q/|q|)₊^p ]        p = λ (0.5 + tanh |q|)        (x)₊ = max(x, 0)
    φ_k(k) = [ k₊^λ, (−k)₊^λ ]
    weights_ij = R(φ_q(q_i))·R(φ_k(k_j)) / Σ_r φ_q(q_i)·φ_k(k_r)
    y = W_O ( LN(concat_h weights_h v_h + DWC(v)) ⊙ silu(x W_G) )

Linear attention divides a query's length out; here it is the power of the query's direction. Keys keep
their length. Positive and negative parts stand apart, so that products are never negative and opposite
channels do not meet. R rotates, in each part, half of the channels by the row and half by the column; the
divisor takes features that are not rotated.

Cost: 4·n·d² multiply-adds a head, as features are twice as wide, and n·dim·kernel², memory linear in n.
Reduces to no registered mechanism.
Source: "NaLaFormer: Norm-Aware Linear Attention for Transformer Models" and its authors' program, which
has these features; the paper's first version writes cosines and sines of directions in the place of the
two parts. The program's ε is added to the mean product that divides.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import silu

from attlas.bases.grid import GatedOnGrid
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option


@mechanism("nalaformer", aliases=("norm-aware-linear-attention",))
class NormAwareLinear(GatedOnGrid):
    """Linear attention whose queries' directions are raised to a power that grows with their norm."""

    power: float = option(
        "λ, of keys and of queries whose norm makes 0.5 + tanh one", default=3.0, at_least=1
    )

    def setup(self) -> None:
        """The norm before the gate."""
        super().setup()
        self.norm = nn.LayerNorm(self.heads * self.head_dim)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Sharpened queries over their divisor, and keys."""
        q, k = self.sharpened(q), parts(k) ** self.power
        divisor = self.mean_product(q, k) + self.eps
        return self.rotated(q) / divisor, self.rotated(k) / k.shape[2]

    def sharpened(
        self, q: Float[Tensor, "batch heads queries width"]
    ) -> Float[Tensor, "batch heads queries twice"]:
        """φ_q, of which no channel is negative."""
        norm = vector_norm(q, dim=-1, keepdim=True)
        direction = q / norm.clamp(min=torch.finfo(q.dtype).tiny)
        sharp: Tensor = parts(direction) ** (self.power * (0.5 + norm.tanh()))
        return sharp

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """All heads normed together, gated, projected."""
        joined = self.norm(rearrange(heads, "b h t d -> b t (h d)"))
        y: Tensor = self.o_proj(joined * silu(self.gate_proj(inputs.x)))
        return y


def parts(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows twice"]:
    """What is positive in x, and what is negative, both without a sign."""
    return torch.cat([x.relu(), (-x).relu()], dim=-1)
