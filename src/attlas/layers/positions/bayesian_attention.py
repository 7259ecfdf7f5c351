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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option
from attlas.positions import Position, additive
from attlas.positions.bias import slopes
from attlas.supports import Supports


class GaussianPrior(Position):
    """The log-prior of each head, a generalised Gaussian of the distance."""

    heads: int = option("query heads", kw_only=False, at_least=1)
    train_loc: bool = option("whether the location μ is trained; 0 otherwise", default=True)
    eps: float = option("added to distances, for a gradient of their power at 0", default=1e-5, above=0)

    def setup(self) -> None:
        """Scale, shape and location of each head's prior."""
        self.table: Tensor | None = None
        self.scale = nn.Parameter(torch.tensor(slopes(self.heads)).log())
        self.shape = nn.Parameter(torch.ones(self.heads))
        self.loc = nn.Parameter(torch.zeros(self.heads), requires_grad=self.train_loc)

    @additive
    def score_mod(
        self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        """Score plus the log-prior of key kv_idx for query q_idx."""
        if self.table is not None:
            return score - self.table[h, kv_idx - q_idx + self.table.shape[1] // 2].to(score.dtype)
        # Distances are exact in float32 to 16 million tokens, in bfloat16 to 256.
        dtype = torch.promote_types(score.dtype, torch.float32)
        return score - self.penalty((kv_idx - q_idx).to(dtype), h).to(score.dtype)

    def penalty(self, distance: Tensor, h: Tensor) -> Tensor:
        """Minus the log-prior of head h at a distance."""
        dtype = distance.dtype
        far = distance - 2 * self.loc[h].to(dtype).sinh()
        return self.scale[h].to(dtype).exp() * (far.abs() + self.eps) ** self.shape[h].to(dtype)

    @contextmanager
    def tabled(self, longest: int) -> Iterator[None]:
        """Inside, the prior is read from a table of all distances: a power for each pair takes a GPU
        several times as long as attention does."""
        heads = torch.arange(len(self.scale), device=self.scale.device)[:, None]
        distance = torch.arange(-longest, longest + 1, device=self.scale.device)
        self.table = self.penalty(distance.float(), heads)
        try:
            yield
        finally:
            self.table = None


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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """One fused call; FlexAttention refuses the prior's gradients, so a GPU takes them by chunks."""
        prior = self.position_encoding
        assert isinstance(prior, GaussianPrior)
        if not q.is_cuda or (self.training and self.dropout > 0):
            return super().attend(q, k, v, inputs)
        change = inputs.by_positions(self.score_mod, k.shape[2])
        if torch.is_grad_enabled() or getattr(change, "of_call", False):
            return ops.attend(
                q, k, v, mask=inputs.pairs, score_mod=change, scale=self.scale,
                route="chunked",
            )  # fmt: skip
        with prior.tabled(k.shape[2]):
            return super().attend(q, k, v, inputs)
