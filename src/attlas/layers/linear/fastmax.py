"""Fastmax: a polynomial takes the exponential's place, so that all pairs are summed without being formed.

    q̂ = (q − mean q) / std q        k̂ alike, over a head's channels
    weights_ts = f(q̂_t·k̂_s) / Σ_r f(q̂_t·k̂_r)        f(s) = a₀ + a₁ s + a₂ s² = 1 + s + s²/2

f is a product of features, f(q·k) = φ(q)·φ(k): φ(x) holds √a₀, all √a₁ x_i, and of the products of two
channels √a₂ x_i² and √(2 a₂) x_i x_j, i < j. So the sums over keys are their moments of order up to two.
Of order two f is positive; of order one weights may be negative, and their sum near 0.

Cost: n·d³ multiply-adds a head, n·d²/2 numbers of features; one state of d²/2 × (d + 1) a head while
decoding. Dropout and pair-by-pair masks need the n² weights.
Reduces to the mean of the visible values where a₁ = a₂ = 0.
Source: "FAST: Factorizable Attention for Speeding up Transformers". Its authors' program divides q and k
by the largest norm in the sequence instead, even in its causal form, where that tells of tokens to come;
with `norm=False` a caller may. Its dropout falls on features, here it falls on weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from attlas.bases.recurrent import RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option

#: The highest power of a score that features are made for.
ORDER = 2


@mechanism("fastmax", aliases=("fast-attention",))
class Fastmax(RecurrentAttention):
    """Attention whose weights are a polynomial of the scores."""

    coefficients: Sequence[float] = option(
        "a₀, a₁ and a₂; fewer for a polynomial of lower order", default=(1.0, 1.0, 0.5), at_least=0
    )
    norm: bool = option("whether queries and keys are standardised", default=True)
    norm_eps: float = option("added to the variance there", default=1e-5, above=0)

    def setup(self) -> None:
        """Refuse polynomials that no features are made for, and the one that is 0."""
        super().setup()
        if not 0 < len(self.coefficients) <= ORDER + 1 or not any(self.coefficients):
            raise ValueError(
                f"coefficients must be 1 to {ORDER + 1} numbers, one above 0, "
                f"got {self.coefficients}"
            )

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """φ of both."""
        return self.moments(q), self.moments(k)

    def moments(
        self, x: Float[Tensor, "batch heads tokens d"]
    ) -> Float[Tensor, "batch heads tokens features"]:
        """φ(x): (d + 1)(d + 2) / 2 features where all three coefficients are above 0."""
        if self.norm:
            x = layer_norm(x, x.shape[-1:], eps=self.norm_eps)
        powers = [torch.ones_like(x[..., :1]), x]
        if len(self.coefficients) > ORDER:
            i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
            powers.append(x[..., i] * x[..., j] * (1 + (i < j).to(x.dtype)).sqrt())
        # Fewer coefficients than powers leave the higher ones out.
        terms = zip(self.coefficients, powers, strict=False)
        return torch.cat([a**0.5 * power for a, power in terms if a], dim=-1)
