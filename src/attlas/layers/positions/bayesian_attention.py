"""Bayesian attention (BAM): positions as a prior over keys, whose logarithm is added to the scores.

    weights = softmax(q kᵀ / √d + log p(j | i)),   p a generalised Gaussian for each head:
    log p(j | i) = −exp(s) · (|j − i − μ| + ε)^β,   μ = 2 sinh(l)      with s, β, l learned

exp(s) is the paper's α^−β; the prior's own normaliser cancels in the softmax.

Cost: that of plain attention; the prior is an additive `score_mod`, fused on a GPU.
Reduces to ALiBi with slopes exp(s) at β = 1 and μ = 0, which is where it starts, and to no positions
at β = 0.
Source: "Bayesian Attention Mechanism: A Probabilistic Framework for Positional Encoding and Context
Length Extrapolation". Parameters and ε are those of the authors' code, which trains no location
unless told to, and may share one prior among layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.kinds.claim import Claim
from attlas.options import option
from attlas.positions import Position
from attlas.positions.base import of_distance, relative
from attlas.positions.bias import slopes
from attlas.supports import Supports


class GaussianPrior(Position):
    """The log-prior of each head, a generalised Gaussian of the distance."""

    heads: int = option("query heads", kw_only=False, at_least=1)
    train_loc: bool = option("whether the location μ is trained; 0 otherwise", default=True)
    eps: float = option("added to distances, for a gradient of their power at 0", default=1e-5, above=0)

    def setup(self) -> None:
        """Scale, shape and location of each head's prior."""
        self.scale = nn.Parameter(torch.tensor(slopes(self.heads)).log())
        self.shape = nn.Parameter(torch.ones(self.heads))
        self.loc = nn.Parameter(torch.zeros(self.heads), requires_grad=self.train_loc)

    @of_distance("log_prior")
    def score_mod(
        self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        """Score plus the log-prior of key kv_idx for query q_idx."""
        return score + self.log_prior(h, relative(q_idx, kv_idx)).to(score.dtype)

    def log_prior(self, h: Tensor, distance: Tensor) -> Tensor:
        """The log-prior of head h at a distance."""
        # Distances are exact in float32 to 16 million tokens, in bfloat16 to 256.
        dtype = torch.promote_types(self.scale.dtype, torch.float32)
        far = distance.to(dtype) - 2 * self.loc[h].to(dtype).sinh()
        return -self.scale[h].to(dtype).exp() * (far.abs() + self.eps) ** self.shape[h].to(dtype)


def _start_from_slopes(layer: Attention, alibi: Any) -> None:
    prior = layer.position_encoding
    prior.get_parameter("scale").copy_(alibi.position_encoding.slopes.double().log())
    alibi.load_state_dict(layer.state_dict(), strict=False)


@mechanism("bayesian-attention-mechanism", aliases=("bam",),
           reduces_to=Reduction("alibi", {}, _start_from_slopes))  # fmt: skip
class Bayesian(Attention):
    """Softmax attention with a learned prior over distances; other position encodings are refused."""

    claims = (
        Claim(
            "a learned prior over distances goes on working far beyond the trained length",
            against=("softmax", "softmax(position='sinusoidal')"), task="extrapolation",
            split="64 tokens", steps=600,
        ),
    )  # fmt: skip

    supports = Supports(cross=False, position=False)
    changes = ("position", "score")

    train_loc: bool = option(
        "whether the prior's location is trained, as its scale and shape are", default=True
    )
    eps: float = option("added to the distance", default=1e-5, above=0)

    def setup(self) -> None:
        """The prior."""
        super().setup()
        self.position_encoding = GaussianPrior(self.heads, train_loc=self.train_loc, eps=self.eps)
