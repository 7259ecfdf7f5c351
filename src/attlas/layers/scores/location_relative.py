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
DCA one that sees nothing, leaves the alignment where it was. Queries of a context all count as real.

Cost: GMM k·n numbers a step, all steps at once; DCA n·hidden tanh, one step after the other, all held
for gradients. Memory quadratic.
Reduces to nothing registered.
Source: "Location-Relative Attention Mechanisms For Robust Long-Form Speech Synthesis"; both ε and the
logistic form rest on coqui's program, whose mixture weights get 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.masks import Mask

VERSIONS, EPS = ("0", "1", "2", "logistic"), 1e-5


class _Walk(Attention):
    """One head of weights over places, from queries alone; values are the inputs themselves."""

    has_causal_form = False
    has_own_position = True
    memory_law = "quadratic"
    #: Weights rest on the queries before, so that a decoder must show it all of them at each step.
    needs_earlier_queries: ClassVar[bool] = True

    def make_projections(self) -> None:
        """Only the way out; what steers the walk is the subclass's."""
        if self.heads != 1 or self.head_dim != self.dim:
            raise ValueError(f"heads must be 1 and head_dim as wide as dim, got {self.heads}")
        self.o_proj = nn.Linear(self.dim, self.dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs as they are."""
        return inputs.x[:, None], inputs.tokens[:, None], inputs.tokens[:, None]

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """The alignment, step by step; precise, since it adds up."""
        visible = inputs.visible(q, k)
        walks = None if inputs.context is not None else inputs.valid
        weights = self.align(inputs, visible, walks)[:, None].to(q.dtype)
        return weights if visible is None else weights.masked_fill(~visible, 0.0)

    def align(self, inputs: Inputs, visible: Tensor | None, walks: Tensor | None) -> Tensor:
        """Weights [batch, queries, keys]; only queries that `walks` names are steps."""
        raise NotImplementedError


@mechanism("gmm-attention", paper="location-relative-attention",
           aliases=("location-relative-attention",), example={"heads": 1})  # fmt: skip
class GMM(_Walk):
    """A mixture whose means walk on.

    Args:
        components: of the mixture.
        hidden: width of the MLP.
        version: "0", "1", "2" or "logistic".
        start: first (Δ, σ), as the paper's V1b and V2b have; None for no such biases.
    """

    def __init__(
        self, dim: int, heads: int = 1, *args: Any, components: int = 5, hidden: int = 128,
        version: str = "2", start: Sequence[int | float] | None = (1.0, 10.0), **options: Any,
    ) -> None:  # fmt: skip
        if version not in VERSIONS:
            raise ValueError(f"version must be one of {VERSIONS}, got {version!r}")
        super().__init__(dim, heads, *args, **options)
        self.version = version
        last = nn.Linear(at_least_one("hidden", hidden), 3 * at_least_one("components", components))
        bend = nn.ReLU() if version == "logistic" else nn.Tanh()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), bend, last)
        if start is not None:
            before = [math.log(v if version in "01" else math.expm1(v)) for v in start]
            if version in "01":  # of σ² there, and of 1 / 2σ²
                before[1] = 2 * before[1] if version == "1" else -2 * before[1] - math.log(2)
            with torch.no_grad():
                last.bias[components:] += torch.tensor(before).repeat_interleave(components)

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

    def align(self, inputs: Inputs, visible: Tensor | None, walks: Tensor | None) -> Tensor:
        """The mixture at every place."""
        shares, means, sigma = (t[..., None] for t in self.mixture(inputs.x, walks))
        at = torch.atleast_2d(inputs.key_positions)[:, None, None, :].to(shares.dtype)
        if self.version == "logistic":
            low, high = (1 / (1 + ((means - at - e) / sigma).sigmoid()) for e in (0.5, 1.5))
            shares, shape = shares + EPS, high - low
        else:
            shape = (-0.5 * ((at - means) / sigma).square()).exp()
        weights: Tensor = (shares * shape).sum(2)
        return weights.masked_fill(weights == 0, 1e-8) if self.version == "logistic" else weights


@mechanism("dynamic-convolution-attention", paper="location-relative-attention", aliases=("dca",),
           example={"heads": 1, "static": (8, 5), "dynamic": (8, 7)})  # fmt: skip
class DCA(_Walk):
    """Energies from convolutions of the alignment before, over a prior that walks on.

    Args:
        hidden: width of the two tanh.
        static: how many filters F, and how many places each sees, an odd number.
        dynamic: the same for G.
        prior: α, β and n of P.
    """

    def __init__(
        self, dim: int, heads: int = 1, *args: Any, hidden: int = 128,
        static: Sequence[int] = (8, 21), dynamic: Sequence[int] = (8, 21),
        prior: Sequence[int | float] = (0.1, 0.9, 10), **options: Any,
    ) -> None:  # fmt: skip
        for name, sizes in (("static", static), ("dynamic", dynamic)):
            if len(sizes) != 2 or min(sizes) < 1 or sizes[1] % 2 == 0:
                raise ValueError(f"{name} takes filters and an odd number of places, got {sizes}")
        if len(prior) != 3 or min(prior) <= 0 or prior[2] % 1:
            raise ValueError(f"prior takes α, β > 0 and a whole n of at least 1, got {prior}")
        super().__init__(dim, heads, *args, **options)
        at_least_one("hidden", hidden)
        self.reach, chances = (static[1], dynamic[1]), [1.0]
        alpha, beta, n = prior
        for k in range(int(n)):
            chances.append(chances[-1] * (n - k) * (k + alpha) / ((k + 1) * (n - k - 1 + beta)))
        self.prior = [chance / sum(chances) for chance in chances]
        self.static = nn.Sequential(
            nn.Linear(static[1], static[0], bias=False), nn.Linear(static[0], hidden, bias=False)
        )
        self.steer = nn.Sequential(
            nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, math.prod(dynamic), bias=False),
            nn.Unflatten(-1, tuple(dynamic)),
        )  # fmt: skip
        self.dynamic = nn.Linear(dynamic[0], hidden)
        self.v = nn.Linear(hidden, 1, bias=False)

    def energies(self, before: Tensor, filters: Tensor) -> Tensor:
        """From the alignment before [batch, keys] and G [batch, filters, places]."""
        still, moving = (
            pad(before.to(filters.dtype), (size // 2, size // 2)).unfold(-1, size, 1)
            for size in self.reach
        )
        hidden = (self.static(still) + self.dynamic(moving @ filters.mT)).tanh()
        behind = pad(before, (len(self.prior) - 1, 0)).unfold(-1, len(self.prior), 1)
        chances = behind @ before.new_tensor(self.prior[::-1])
        energies: Tensor = self.v(hidden).squeeze(-1) + chances.clamp(min=1e-6).log()
        return energies

    def align(self, inputs: Inputs, visible: Tensor | None, walks: Tensor | None) -> Tensor:
        """One step after the other, from the first place that any query sees."""
        (batch, steps, _), keys = inputs.x.shape, inputs.tokens.shape[1]
        filters, first, rows = self.steer(inputs.x), inputs.x.new_zeros(1), list[Tensor]()
        if visible is not None:
            visible = visible[:, 0].expand(batch, steps, keys)
            first = visible.any(1).int().argmax(-1)
            walks = visible.any(-1) if walks is None else visible.any(-1) & walks
        now = torch.arange(keys, device=first.device) == first[:, None]
        now = now.to(torch.promote_types(inputs.x.dtype, torch.float32)).expand(batch, -1)
        for t in range(steps):
            energies = self.energies(now, filters[:, t])
            if visible is not None:
                energies = energies.masked_fill(~visible[:, t], -torch.inf)
            rows.append(ops.softmax(energies))
            now = rows[-1] if walks is None else torch.where(walks[:, t, None], rows[-1], now)
        return torch.stack(rows, dim=1)
