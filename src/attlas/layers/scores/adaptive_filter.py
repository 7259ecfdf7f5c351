"""Adaptive filter attention (AFA): keys foretell the query through a linear system with noise.

    dz = (μ + iω) z dt + noise:   a key at distance Δ = |t_i − t_j| foretells e^{(μ + iω)Δ} k_j
    V(Δ) = σ² (1 − e^{2μΔ}) / (−2μ) + η² e^{2μΔ} + γ²                 variance of what it foretells
    r² = |q̃_i|² + e^{2μΔ} |k̃_j|² − 2 e^{μΔ} Re⟨q̃_i, k̃_j⟩,   x̃_t = e^{−iωt} x_t
    weights = softmax(τ² (B − log(1 + r² S))),   B = −log V,  S = 1/(ν d V)       robust; else B − r² S
    out_i = e^{iωt_i} Σ_j weights_ij e^{μΔ} ṽ_j

Halves of a head's vector are the real and imaginary parts of d numbers. μ ≤ 0, ω in conjugate pairs, and
the noises are trained for each head, μ and ω in units of the `length` trained for.

Cost: the scores of plain attention and some dozen operations on each; memory quadratic in length.
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
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.masks import Mask

CHOICES = {"additive": ("dle", "linear", "none"), "multiplicative": ("dle", "linear", "constant"),
           "input_norm": ("none", "qk", "qkv")}  # fmt: skip


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
    """Attention as filtering; times are the tokens' positions, in steps.

    Args:
        length: tokens over which decays and rotations begin at the order of one.
        robust: residuals count by their logarithm, so that outliers cannot rule.
        additive: B: "dle" as above, "linear" −νΔ, or "none".
        multiplicative: S: "dle" as above, "linear" 1/(d (σ²Δ + η²)), or "constant" 1/d.
        input_norm: what is normalised, with a gain for each number: "none", "qk" or "qkv".
        output_norm: the estimate is normalised so.
        residual: the estimate gets the query's own value on top, as projected.
        predict: the estimate moves on by one step.
    """

    has_own_position = True
    memory_law = "quadratic"
    eps, norm_eps = 1e-5, 1e-6

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, length: int = 512, robust: bool = True,
        additive: Literal["dle", "linear", "none"] = "dle",
        multiplicative: Literal["dle", "linear", "constant"] = "dle",
        input_norm: Literal["none", "qk", "qkv"] = "none", output_norm: bool = False,
        residual: bool = False, predict: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        for name, value in zip(CHOICES, (additive, multiplicative, input_norm), strict=True):
            if value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {CHOICES[name]}, got {value!r}")
        self.length, self.robust = at_least_one("length", length), robust
        self.additive, self.multiplicative = additive, multiplicative
        self.residual, self.predict = residual, predict
        super().__init__(dim, heads, *args, **options)
        self.omega = nn.Parameter(torch.randn(self.kv_heads, self.head_dim // 4))
        self.mu, self.sigma, self.eta, self.gamma = (
            nn.Parameter(torch.randn(heads)) for _ in range(4)
        )
        self.tau, self.nu = nn.Parameter(torch.ones(heads)), nn.Parameter(torch.ones(heads))
        normed = input_norm.replace("none", "") + "o" * output_norm
        counts = {n: self.kv_heads if n in "kv" else heads for n in normed}
        self.gains = nn.ParameterDict(
            {n: torch.ones(h, self.head_dim // 2) for n, h in counts.items()}
        )

    def make_projections(self) -> None:
        """Projections that begin as complex matrices of random moduli and phases."""
        if self.head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4, got {self.head_dim}")
        super().make_projections()
        for name, axes in zip("qkvo", 3 * ["(h two d) x"] + ["x (h two d)"], strict=True):
            weight = self.get_parameter(f"{name}_proj.weight").data
            parts = rearrange(weight, f"{axes} -> two h d x", two=2, d=self.head_dim // 2)
            modulus = (
                torch.randn_like(parts[0]) * (2 / (self.dim + parts[0, ..., 0].numel())) ** 0.5
            )
            phase = 2 * math.pi * torch.rand_like(modulus)
            parts.copy_(torch.stack((modulus * phase.cos(), modulus * phase.sin())))

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """q̃, k̃ and ṽ, turned back to time 0; a cache holds them so."""
        q, k, v = (self.normed(n, x) for n, x in zip("qkv", super().project(inputs), strict=True))
        at = inputs.token_positions
        return self.rotated(q, -inputs.positions), self.rotated(k, -at), self.rotated(v, -at)

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Weights by the likelihood of each residual, times the decay; rows sum to at most 1."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        times = inputs.positions_of(k.shape[2])
        far = (inputs.positions[..., None, :, None] - times[..., None, None, :]).abs().to(dtype)
        noises = softplus(torch.stack((self.sigma, self.eta, self.gamma, self.nu)).to(dtype))
        (sigma, eta, gamma, nu), mu = noises[..., None, None], self.decay(dtype)[:, None, None]
        eta, gamma, nu = eta + self.eps, gamma + self.eps, nu + self.eps
        exponent = (mu * far).clamp(min=-10.0)
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
        scores = scores * self.tau.to(dtype).square()[:, None, None]
        visible = inputs.visible(q, k)
        shown = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
        return (self.normalize(shown) * decay).to(inputs.x.dtype)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """The estimate at the query's time, or one step further, projected."""
        heads = self.rotated(heads, inputs.positions)
        if self.residual:
            own = self.split_heads(self.v_proj(inputs.x))
            heads = heads + ops.repeated(own, heads.shape[1])
        heads = self.normed("o", heads)
        if self.predict:
            step = self.decay(torch.promote_types(heads.dtype, torch.float32)).exp()[:, None, None]
            heads = self.rotated(heads, torch.ones_like(inputs.positions)) * step.to(heads.dtype)
        return super().output(heads, inputs)

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
        valid, imaginary = x.chunk(2, dim=-1)
        return torch.cat((valid * cos - imaginary * sin, valid * sin + imaginary * cos), dim=-1)
