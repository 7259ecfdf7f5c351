"""Adaptive filter attention (AFA): keys foretell the query through a linear system with noise.

    dz = (μ + iω) z dt + noise:   a key at distance Δ = |t_i − t_j| foretells e^{(μ + iω)Δ} k_j
    V(Δ) = σ² (1 − e^{2μΔ}) / (−2μ) + η² e^{2μΔ} + γ²                 variance of what it foretells
    r² = |q̃_i|² + e^{2μΔ} |k̃_j|² − 2 e^{μΔ} Re⟨q̃_i, k̃_j⟩,   x̃_t = e^{−iωt} x_t
    weights = softmax(τ² (B − log(1 + r² S))),   B = −log V,  S = 1/(ν d V)       robust; else B − r² S
    out_i = e^{iωt_i} Σ_j weights_ij e^{μΔ} ṽ_j

Halves of a head's vector are the real and imaginary parts of d numbers. μ ≤ 0, ω in conjugate pairs, and
the noises are trained for each head, μ and ω in units of the `length` trained for.

Cost: the scores of plain attention and some dozen operations on each.
Reduces to QK-norm attention without dynamics and process noise (μ = ω = σ = 0), with normalised queries
and keys and weights that are not robust.
Source: "Attention as an Adaptive Filter", its isotropic form as in the authors' code, whose floors
(1e-5) and least exponent (−10) are kept. Grouped keys are ours: a group shares ω.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import rms_norm, softplus

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports


def _stop_dynamics(layer: Any, plain: Any) -> None:
    layer.eps = layer.norm_eps = 0.0
    stopped = {"mu": 40.0, "omega": 0.0, "sigma": -1e4, "eta": 0.0, "gamma": 0.0, "nu": 0.0}
    for name, value in stopped.items():
        nn.init.constant_(layer.get_parameter(name), value)
    plain.load_state_dict(layer.state_dict(), strict=False)
    plain.g.fill_(2 / math.log(2) ** 2)  # 4 τ² / (ν V), softplus(0) being ln 2


@mechanism("adaptive-filter-attention", aliases=("afa",), reduces_to=Reduction(
    "qk-norm", {"robust": False, "input_norm": "qk"}, _stop_dynamics
))  # fmt: skip
class AdaptiveFilter(Attention):
    """Attention as filtering; times are the tokens' positions, in steps."""

    supports = Supports(position=False)
    changes = ("aggregate",)
    beyond = (
        "project: matrices begin as complex ones; values, too, go back to time 0, and may be normed",
        "output: the estimate goes to the query's time, or further, and may be normed",
    )
    eps, norm_eps = 1e-5, 1e-6

    length: int = option(
        "tokens over which decays and rotations begin at the order of one", default=512, at_least=1
    )
    robust: bool = option(
        "residuals count by their logarithm, so that outliers cannot rule", default=True
    )
    additive: Literal["dle", "linear", "none"] = option(
        "B: dle as above, linear −νΔ, or none", default="dle"
    )
    multiplicative: Literal["dle", "linear", "constant"] = option(
        "S: dle as above, linear 1/(d (σ²Δ + η²)), or constant 1/d", default="dle"
    )
    input_norm: Literal["none", "qk", "qkv"] = option(
        "what is normalised, with a gain for each number", default="none"
    )
    output_norm: bool = option("whether the estimate is normalised so", default=False)
    residual: bool = option("the estimate gets the query's own value, as projected", default=False)
    turn_back: bool = option(
        "the estimate goes to the query's time; else it stays at time 0, where values are summed up",
        default=True,
    )
    predict: bool = option("the estimate moves on by one step", default=False)

    def setup(self) -> None:
        """Complex matrices of random moduli and phases, and the parameters of the linear system."""
        super().setup()
        if self.head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, got {self.head_dim}")
        for name, axes in zip("qkvo", 3 * ["(h two d) x"] + ["x (h two d)"], strict=True):
            weight = self.get_parameter(f"{name}_proj.weight").data
            parts = rearrange(weight, f"{axes} -> two h d x", two=2, d=self.head_dim // 2)
            modulus = (
                torch.randn_like(parts[0]) * (2 / (self.dim + parts[0, ..., 0].numel())) ** 0.5
            )
            phase = 2 * math.pi * torch.rand_like(modulus)
            parts.copy_(torch.stack((modulus * phase.cos(), modulus * phase.sin())))
        self.omega = nn.Parameter(torch.randn(self.kv_heads, self.head_dim // 4))
        self.mu, self.sigma, self.eta, self.gamma = (
            nn.Parameter(torch.randn(self.heads)) for _ in range(4)
        )
        self.tau, self.nu = (nn.Parameter(torch.ones(self.heads)) for _ in range(2))
        normed = self.input_norm.replace("none", "") + "o" * self.output_norm
        counts = {n: self.kv_heads if n in "kv" else self.heads for n in normed}
        self.gains = nn.ParameterDict(
            {n: torch.ones(h, self.head_dim // 2) for n, h in counts.items()}
        )

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and ṽ, the latter rotated back to time 0; a cache holds it so."""
        q, k, v = (self.normed(n, x) for n, x in zip("qkv", super().project(inputs), strict=True))
        return q, k, self.rotated(v, -inputs.token_positions)

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """q̃ and k̃, rotated back to time 0."""
        return self.rotated(q, -inputs.positions), self.rotated(k, -inputs.token_positions)

    @ops.exact
    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Logarithms of the residuals' likelihoods, in float32 at least."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        far = self.distance(k.shape[2], dtype, inputs)
        mu, exponent = self.exponent(far)
        noises = softplus(torch.stack((self.sigma, self.eta, self.gamma, self.nu)).to(dtype))
        sigma, eta, gamma, nu = noises[..., None, None]
        eta, gamma, nu = eta + self.eps, gamma + self.eps, nu + self.eps
        elapsed = torch.where(
            mu == 0, far, (2 * exponent).expm1() / torch.where(mu == 0, 1.0, 2 * mu)
        )
        variance = sigma * elapsed + eta * (2 * exponent).exp() + gamma
        decay, q, k = exponent.exp(), q.to(dtype), ops.repeated(k, q.shape[1]).to(dtype)
        keys = k.square().sum(-1)[..., None, :] * decay.square()
        residual = q.square().sum(-1, keepdim=True) + keys - 2 * decay * (q @ k.mT)
        ratio = residual.clamp(min=0.0) / (self.head_dim // 2)
        if self.multiplicative != "constant":
            ratio = ratio / (nu * variance if self.multiplicative == "dle" else sigma * far + eta)
        scores = -ratio.log1p() if self.robust else -ratio
        if self.additive != "none":
            scores = scores - (variance.log() if self.additive == "dle" else nu * far)
        return scores * self.tau.to(dtype).square()[:, None, None]

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """Weights by likelihood, times the decay; rows sum to at most 1."""
        _, exponent = self.exponent(self.distance(scores.shape[-1], scores.dtype, inputs))
        return (super().normalize(scores, inputs) * exponent.exp()).to(inputs.x.dtype)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """The estimate at the query's time, or one step further, projected."""
        if self.turn_back:
            heads = self.rotated(heads, inputs.positions)
        if self.residual:
            own = self.split_heads(self.v_proj(inputs.x))
            heads = heads + ops.repeated(own, heads.shape[1])
        heads = self.normed("o", heads)
        if self.predict:
            step = self.decay(torch.promote_types(heads.dtype, torch.float32)).exp()[:, None, None]
            heads = self.rotated(heads, torch.ones_like(inputs.positions)) * step.to(heads.dtype)
        return super().output(heads, inputs)

    def distance(self, keys: int, dtype: torch.dtype, inputs: Inputs) -> Tensor:
        """Δ between every query and the last `keys` keys [batch or 1, 1, queries, keys]."""
        times = inputs.positions_of(keys)
        return (inputs.positions[..., None, :, None] - times[..., None, None, :]).abs().to(dtype)

    def exponent(self, far: Tensor) -> tuple[Tensor, Tensor]:
        """μ [heads, 1, 1], and μΔ but not below −10."""
        mu = self.decay(far.dtype)[:, None, None]
        return mu, (mu * far).clamp(min=-10.0)

    def decay(self, dtype: torch.dtype) -> Tensor:
        """μ of every head, at most 0."""
        mu: Tensor = (self.mu.to(dtype).sigmoid() - 1) * (5 / self.length) - self.eps
        return mu

    def normed(self, name: str, x: Tensor) -> Tensor:
        """Heads at root mean square 1, times their gains, if q, k, v or o called `name` has any."""
        if name not in self.gains:
            return x
        x = rms_norm(x, x.shape[-1:], eps=self.norm_eps)
        gained: Tensor = x * self.gains[name].repeat(1, 2)[:, None].to(x.dtype)
        return gained

    def rotated(self, x: Tensor, times: Tensor) -> Tensor:
        """x e^{iωt}, the angles in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        omega = self.omega.to(dtype) * (10 * math.pi / self.length)
        omega = torch.stack((omega, -omega), dim=-1).flatten(-2)
        omega = omega.repeat_interleave(x.shape[1] // len(omega), dim=0)
        angle = times[..., None, :, None].to(dtype) * omega[:, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        real, imaginary = x.chunk(2, dim=-1)
        return torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
