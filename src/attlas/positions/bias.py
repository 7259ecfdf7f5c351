"""Positions as a bias on the scores: ALiBi's fixed slopes, T5's trained buckets.

    ALiBi:  score − m_h · |q − k|,   m_h = 2^(−8h/H) for H a power of two
    T5:     score + B[bucket(k − q), h]

Sources: "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation";
"Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attlas.options import option
from attlas.positions.base import Position, additive, of_distance, relative


class ALiBi(Position):
    """Linear penalties on distance, steeper for earlier heads; nothing is trained."""

    heads: int = option("query heads", at_least=1, kw_only=False)

    def setup(self) -> None:
        """Make the slopes."""
        super().setup()
        self.slopes: Tensor
        self.hold("slopes", lambda: torch.tensor(slopes(self.heads), dtype=torch.float32))

    @additive
    def score_mod(
        self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        """Score less slope times distance."""
        return score - (self.slopes.to(h.device)[h] * relative(q_idx, kv_idx).abs()).to(score.dtype)


class T5Bias(Position):
    """A trained number for each head and bucket of distances, exact near and logarithmic far."""

    heads: int = option("query heads", at_least=1, kw_only=False)
    buckets: int = option("numbers a head", default=32, at_least=1, kw_only=False)
    max_distance: int = option(
        "tokens from which on all distances share a bucket", default=128, at_least=1, kw_only=False
    )
    bidirectional: bool = option(
        "half of the buckets are for keys after the query", default=True, kw_only=False
    )

    def setup(self) -> None:
        """Draw the biases."""
        super().setup()
        self.weight = nn.Parameter(torch.randn(self.buckets, self.heads) * 0.02)

    @of_distance("bias")
    def score_mod(
        self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        """Score plus the bias of the pair's bucket."""
        return score + self.bias(h, relative(q_idx, kv_idx)).to(score.dtype)

    def bias(self, h: Tensor, distance: Tensor) -> Tensor:
        """The number of a distance's bucket."""
        return self.weight[self.bucket(distance), h]

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of each key-minus-query distance."""
        count = len(self.weight)
        first = torch.zeros_like(distance)
        if self.bidirectional:
            count //= 2
            first = (distance > 0).long() * count
            steps = distance.abs()
        else:
            steps = (-distance).clamp(min=0)
        exact = count // 2
        ratio = (steps.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
        return first + torch.where(steps < exact, steps, far)


def slopes(heads: int) -> list[float]:
    """Geometric slopes; other head counts take every other slope of the next power of two."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    extra = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * (heads - power), 2)]
    return slopes + extra
