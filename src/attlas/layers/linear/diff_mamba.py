"""Differential Mamba: the difference of two selective state spaces, normalised.

    h_t = e^{Δ_t A} h_{t−1} + Δ_t B_t x_tᵀ      o_t = h_tᵀ C_t + D x_t
    Δ = softplus(W_Δ u + b)      A = −e^a
    M(u) = W ( γ ⊙ RMSNorm( o ⊙ SiLU(W_z u) ) )     x, B, C = SiLU(conv(W_in u))
    y = (1 − λ_init) RMSNorm( M_1(u) − λ M_2(u) )    λ = σ(Σ λ_q) + λ_init,  λ_init = 0.8 − 0.6 e^{−0.3 l}

Two mixers with parameters of their own look at the same tokens; what both overweigh cancels, as in the
differential transformer. A mixer is Mamba-2's: a state of S × d for every head, a decay for each token
and head, which `ops.recurrence` takes in chunks or steps: C queries, Δ B keys, x values.

Cost: 8·n·S·d multiply-adds a head of both, memory linear in n; two states of S × d a head and the last
tokens of a short convolution while decoding.
Reduces to no registered mechanism; λ = 0 is a normalised Mamba-2 mixer.
Source: "Differential Mamba" and its authors' program, in its Mamba-2 form, without the norm and the
residual around the block. λ_q begins normal with spread 1, as in the program: at width 768 σ(Σ λ_q) is
then within a hundredth of 0 or of 1 in 87 draws of 100. The paper's Mamba-1 form has exponentials of two
dot products for σ(Σ λ_q). A group of heads shares B and C with its neighbours; in the program head h
takes group h mod G.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from attlas.bases.packing import short_convolution
from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.options import option

#: Mixers.
TWO = 2


@mechanism("diff-mamba", aliases=("differential-mamba",), example={"state": 6})
class DiffMamba(RecurrentAttention):
    """The difference of two Mamba-2 mixers; `groups` stand for `kv_heads`."""

    supports = replace(
        RecurrentAttention.supports, bidirectional=False, cross=False, position=False,
        masks="padding",
    )  # fmt: skip
    beyond = ("project: a Mamba-2 mixer's, two of them with a short convolution each",)
    normalized = False

    state: int = option("width of a head's state, S", default=128, at_least=1)
    groups: int = option("of heads that share B and C, a divisor of heads", default=1, at_least=1)
    kernel_size: int = option("tokens of the short convolution", default=4, at_least=1)
    step_limits: tuple[float, float] = option(
        "least and most that Δ may be", default=(0.0, math.inf), at_least=0
    )
    norm_eps: float = option("added in all norms", default=1e-5, at_least=0, alias="eps")

    def setup(self) -> None:
        """Decays, D, the bias of Δ, norms and λ of both mixers.

        Raises:
            ValueError: `kv_heads`, groups that do not divide the heads, or limits in the wrong order.
        """
        super().setup()
        if self.kv_heads != self.heads:
            raise UserError(
                f"kv_heads are groups here, so must be heads={self.heads}, got {self.kv_heads}"
            )
        if self.heads % self.groups:
            raise UserError(f"groups must divide heads={self.heads}, got {self.groups}")
        if self.step_limits[0] > self.step_limits[1]:
            raise UserError(f"step_limits must be least and most, got {self.step_limits}")
        inner, heads = self.heads * self.head_dim, TWO * self.heads
        self.rate = nn.Parameter(torch.arange(1.0, self.heads + 1).log().repeat(TWO))
        self.skip = nn.Parameter(torch.ones(heads))
        steps = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(steps + (-torch.expm1(-steps)).log())  # softplus's inverse
        self.norms = nn.ModuleList(nn.RMSNorm(inner, eps=self.norm_eps) for _ in range(TWO))
        self.sub_norm = nn.RMSNorm(self.dim, eps=self.norm_eps)
        self.lambda_q = nn.Parameter(torch.randn(self.dim))
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * self.layer_idx)

    def make_projections(self) -> None:
        """Both mixers' projections and convolutions."""
        inner = self.heads * self.head_dim
        channels = TWO * (inner + 2 * self.groups * self.state)
        self.in_proj = nn.Linear(self.dim, channels, bias=self.bias)
        self.gate_proj = nn.Linear(self.dim, TWO * inner, bias=self.bias)
        self.step_proj = nn.Linear(self.dim, TWO * self.heads, bias=self.bias)
        self.conv = nn.Conv1d(channels, channels, self.kernel_size, groups=channels)
        self.o_proj: Any = nn.ModuleList(
            nn.Linear(inner, self.dim, bias=self.bias) for _ in range(TWO)
        )

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """C, Δ B and x of all heads, the first mixer's before the second's."""
        mixed, last = short_convolution(
            self.in_proj(inputs.x), self.conv, inputs.valid_now, inputs.recall("conv")
        )
        inputs.remember("conv", last)
        inner, shared = self.heads * self.head_dim, self.groups * self.state
        each = rearrange(silu(mixed), "b t (m c) -> m b t c", m=TWO)
        x, b, c = each.split([inner, shared, shared], dim=-1)
        spread = "m b t (g s) -> b (m g r) t s"
        b, c = (repeat(y, spread, s=self.state, r=self.heads // self.groups) for y in (b, c))
        v = rearrange(x, "m b t (h d) -> b (m h) t d", d=self.head_dim)
        return c, b * self.steps(inputs)[..., None], v

    def steps(self, inputs: Inputs) -> Float[Tensor, "batch heads tokens"]:
        """Δ of all heads."""
        return softplus(self.step_proj(inputs.x) + self.step_bias).clamp(*self.step_limits).mT

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """Δ A."""
        return {"log_decay": -self.rate.exp()[:, None] * self.steps(inputs)}

    def recur(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The recurrence and D x."""
        return super().recur(q, k, v, inputs) + self.skip[:, None, None] * v

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """The recurrence's map, and D on its diagonal."""
        weights = super().weigh(q, k, inputs)
        return weights + torch.diag_embed(self.skip[:, None].expand(-1, q.shape[2]))

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Each mixer's heads gated, normalised and projected; their difference normalised."""
        gates = rearrange(silu(self.gate_proj(inputs.x)), "b t (m c) -> m b t c", m=TWO)
        joined = rearrange(heads, "b (m h) t d -> m b t (h d)", m=TWO) * gates
        first, second = (self.o_proj[i](self.norms[i](joined[i])) for i in range(TWO))
        share = self.lambda_q.sum().sigmoid() + self.lambda_init
        y: Tensor = self.sub_norm(first - share * second) * (1 - self.lambda_init)
        return y
