"""Query-key normalisation: the score is a cosine times one learned number.

    weights = softmax(g · q̂ k̂ᵀ),   q̂ = q/‖q‖, k̂ = k/‖k‖ along a head's width,   no 1/√d
    g starts at log₂(L² − L), L a high percentile of the training lengths

Cost: that of plain attention; keys are cached before the norm, so a cache reads the same bytes.
Reduces to a uniform mean over the visible keys at g = 0. Logits never leave [−|g|, |g|].
Source: "Query-Key Normalization for Transformers".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option


@mechanism("qk-norm")
class QKNorm(Attention):
    """Attention by cosine."""

    length: int = option(
        "L, the 97.5th percentile of the training lengths in the paper", default=512, at_least=2
    )

    def setup(self) -> None:
        """g takes the place of 1/√d."""
        super().setup()
        self.g = nn.Parameter(torch.tensor(math.log2(self.length**2 - self.length)))
        self.scale = 1.0

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Unit queries times g, and unit keys."""
        return self.g * ops.unit(q), ops.unit(k)
