"""Location-relative attention: an alignment that only walks on, and never looks at what it reads.

GMM:    (ω̂, Δ̂, σ̂) = MLP(query_t);   μ_t = μ_{t−1} + Δ_t
        a_t[j] = Σ_k ω_k / Z_k exp(−(j − μ_k)² / 2σ_k²)
    V0   Δ = e^Δ̂, σ = √(e^−σ̂ / 2), ω = e^ω̂, Z = 1
    V1   Δ = e^Δ̂, σ = e^(σ̂/2), ω = softmax(ω̂), Z = √(2πσ²)
    V2   as V1, with Δ and σ by softplus
    logistic   as V2, with differences of 1 / (1 + sigmoid((μ − edge) / σ))
DCA:    a_t = softmax(v·tanh(U (F ∗ a_{t−1}) + T (G_t ∗ a_{t−1}) + b) + log max(P ∗ a_{t−1}, 1e-6))
        G_t = W₂ tanh(W₁ query_t + b₁);   P: chances of walking on by 0, ..., n, beta-binomial

There is one head. GMM weights do not sum to 1; DCA begins with all weight on the first place in sight.
Queries are steps in time: one after the other, each with all places in sight; a padded query, and in
DCA one that sees nothing, leaves the alignment where it was. Queries of a context all count as valid.

Cost: GMM k·n numbers a step, all steps at once; DCA n·hidden tanh, one step after the other, all held
for gradients. Memory quadratic.
Reduces to nothing registered.
Source: "Location-Relative Attention Mechanisms For Robust Long-Form Speech Synthesis"; both ε and the
logistic form rest on coqui's program, whose mixture weights get 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports

EPS = 1e-5


class _Walk(Attention):
    """One head of weights over places, from queries alone; values are the inputs themselves."""

    supports = Supports(causal=False, position=False, memory="quadratic", queries="earlier",
                        counts=True)  # fmt: skip
    changes = ("position",)
    beyond = ("project: values are the inputs themselves, and nothing is projected to be compared",)

    heads: int = option("query heads: one", default=1, at_least=1, kw_only=False)

    def setup(self) -> None:
        """Refuse other heads than a single one as wide as the layer."""
        super().setup()
        if self.heads != 1 or self.head_dim != self.dim:
            raise UserError(f"heads must be 1 and head_dim as wide as dim, got {self.heads}")

    def make_projections(self) -> None:
        """Only the way out; what steers the walk is the subclass's."""
        self.o_proj = nn.Linear(self.dim, self.dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs as they are."""
        return inputs.x[:, None], inputs.tokens[:, None], inputs.tokens[:, None]

    def steps(self, inputs: Inputs) -> Tensor | None:
        """Queries that are steps in time [batch, queries]; None for all."""
        return None if inputs.context is not None else inputs.valid


@mechanism("gmm-attention", paper="location-relative-attention",
           aliases=("location-relative-attention",), example={"heads": 1})  # fmt: skip
class GMM(_Walk):
    """A mixture whose means walk on."""

    components: int = option("components of the mixture", default=5, at_least=1)
    hidden: int = option("width of the MLP", default=128, at_least=1)
    version: Literal["0", "1", "2", "logistic"] = option("which of the forms above", default="2")
    start: Sequence[float] | None = option(
        "first (Δ, σ) in places, as the paper's V1b and V2b have; None for no such biases",
        default=(1.0, 10.0),
    )

    def setup(self) -> None:
        """The MLP, whose biases give the first steps."""
        super().setup()
        last = nn.Linear(self.hidden, 3 * self.components)
        bend = nn.ReLU() if self.version == "logistic" else nn.Tanh()
        self.mlp = nn.Sequential(nn.Linear(self.dim, self.hidden), bend, last)
        if self.start is not None:
            inverse = (
                math.log if self.version in "01" else lambda value: math.log(math.expm1(value))
            )
            before = [inverse(value) for value in self.start]
            if self.version in "01":  # of σ² there, and of 1 / 2σ²
                before[1] = 2 * before[1] if self.version == "1" else -2 * before[1] - math.log(2)
            with torch.no_grad():
                biases = torch.tensor(before).repeat_interleave(self.components)
                last.bias[self.components :] += biases

    def mixture(self, x: Tensor, walks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Shares (over Z), means and widths, each [batch, queries, components]."""
        shares, delta, sigma = (
            self.mlp(x).to(torch.promote_types(x.dtype, torch.float32)).chunk(3, -1)
        )
        if self.version in "01":
            delta = delta.clamp(max=80.0).exp()
            sigma = sigma.clamp(-80.0, 80.0)
            sigma = ((-sigma).exp() / 2 if self.version == "0" else sigma.exp()).sqrt() + EPS
        else:
            delta, sigma = softplus(delta), softplus(sigma) + EPS
        shares = shares.clamp(max=80.0).exp() if self.version == "0" else shares.softmax(-1)
        if self.version in "12":
            shares = shares / (sigma * math.sqrt(2 * math.pi))
        if walks is not None:
            delta = delta.masked_fill(~walks[..., None], 0.0)
        return shares, delta.cumsum(1), sigma

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """The mixture at every place; precise, since means add up."""
        shares, means, sigma = (t[..., None] for t in self.mixture(inputs.x, self.steps(inputs)))
        at = torch.atleast_2d(inputs.key_positions)[:, None, None, :].to(shares.dtype)
        if self.version == "logistic":
            low, high = (1 / (1 + ((means - at - e) / sigma).sigmoid()) for e in (0.5, 1.5))
            shares, shape = shares + EPS, high - low
        else:
            shape = (-0.5 * ((at - means) / sigma).square()).exp()
        scores: Tensor = (shares * shape).sum(2)
        if self.version == "logistic":
            scores = scores.masked_fill(scores == 0, 1e-8)
        return scores[:, None]

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """The mixture itself, 0 at hidden places."""
        return scores.masked_fill(scores == -torch.inf, 0.0).to(inputs.x.dtype)


@mechanism("dynamic-convolution-attention", paper="location-relative-attention", aliases=("dca",),
           example={"heads": 1, "static": (8, 5), "dynamic": (8, 7)})  # fmt: skip
class DCA(_Walk):
    """Energies from convolutions of the alignment before, over a prior that walks on."""

    supports = replace(
        _Walk.supports, gaps=False,
        one_length="every step waits for the alignment before, so a length is steps",
    )  # fmt: skip

    hidden: int = option("width of the two tanh", default=128, at_least=1)
    static_sizes: Sequence[int] = option(
        "how many filters F, and how many places each sees, an odd number", default=(8, 21),
        alias="static", at_least=1,
    )  # fmt: skip
    dynamic_sizes: Sequence[int] = option(
        "the same for G", default=(8, 21), alias="dynamic", at_least=1
    )
    prior_shape: Sequence[float] = option(
        "α, β and n of P", default=(0.1, 0.9, 10), alias="prior", above=0
    )

    def setup(self) -> None:
        """The filters, and the chances of walking on."""
        super().setup()
        for name, sizes in (("static", self.static_sizes), ("dynamic", self.dynamic_sizes)):
            if len(sizes) != 2 or sizes[1] % 2 == 0:
                raise UserError(f"{name} takes filters and an odd number of places, got {sizes}")
        (static, self.still), (dynamic, self.moving) = self.static_sizes, self.dynamic_sizes
        if len(self.prior_shape) != 3 or self.prior_shape[2] % 1:
            raise UserError(f"prior takes α, β and a whole n, got {self.prior_shape}")
        (alpha, beta, n), chances = self.prior_shape, [1.0]
        for k in range(int(n)):
            chances.append(chances[-1] * (n - k) * (k + alpha) / ((k + 1) * (n - k - 1 + beta)))
        self.prior = [chance / sum(chances) for chance in chances]
        self.static = nn.Sequential(
            nn.Linear(self.still, static, bias=False), nn.Linear(static, self.hidden, bias=False)
        )
        self.steer = nn.Sequential(
            nn.Linear(self.dim, self.hidden), nn.Tanh(),
            nn.Linear(self.hidden, dynamic * self.moving, bias=False),
            nn.Unflatten(-1, (dynamic, self.moving)),
        )  # fmt: skip
        self.dynamic = nn.Linear(dynamic, self.hidden)
        self.v = nn.Linear(self.hidden, 1, bias=False)

    def energies(self, before: Tensor, filters: Tensor) -> Tensor:
        """From the alignment before [batch, keys] and G [batch, filters, places]."""
        still, moving = (
            pad(before.to(filters.dtype), (size // 2, size // 2)).unfold(-1, size, 1)
            for size in (self.still, self.moving)
        )
        hidden = (self.static(still) + self.dynamic(moving @ filters.mT)).tanh()
        behind = pad(before, (len(self.prior) - 1, 0)).unfold(-1, len(self.prior), 1)
        chances = behind @ before.new_tensor(self.prior[::-1])
        energies: Tensor = self.v(hidden).squeeze(-1) + chances.clamp(min=1e-6).log()
        return energies

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Energies, one step after the other, from the first place that any query sees."""
        (batch, steps, _), keys = inputs.x.shape, inputs.tokens.shape[1]
        filters, first = self.steer(inputs.x), inputs.x.new_zeros(1)
        rows: list[Tensor] = []
        visible, walks = inputs.visible(q, k), self.steps(inputs)
        if visible is not None:
            visible = visible[:, 0].expand(batch, steps, keys)
            first = visible.any(1).int().argmax(-1)
            walks = visible.any(-1) if walks is None else visible.any(-1) & walks
        now = torch.arange(keys, device=first.device) == first[:, None]
        now = now.to(torch.promote_types(inputs.x.dtype, torch.float32)).expand(batch, -1)
        for t in range(steps):
            rows.append(self.energies(now, filters[:, t]))
            shown = (
                rows[-1] if visible is None else rows[-1].masked_fill(~visible[:, t], -torch.inf)
            )
            after = ops.softmax(shown)
            now = after if walks is None else torch.where(walks[:, t, None], after, now)
        return torch.stack(rows, dim=1)[:, None]

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """The alignment of every step."""
        return super().normalize(scores, inputs).to(inputs.x.dtype)
