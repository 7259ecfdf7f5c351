"""Probabilistic attention: queries and values are drawn from a mixture, one Gaussian for each key.

    w_ij ∝ π_j exp(−α_j/2 |q_i − ζ_j|² − β_j/2 |v_i − μ_j|²),   y_i = Σ_j w_ij μ_j
    keys      ζ_j ← (z ζ_j + α_j Σ_i w_ij q_i) / (z + α_j Σ_i w_ij)
    values    μ_j ← (m μ_j + β_j Σ_i w_ij f_i) / (m + β_j Σ_i w_ij),    i where the value f_i is fixed

ζ are the keys, μ the values. The value term is there where values v_i are given. After every step of
either kind, w is computed anew. π is flat, or exp(α_j/2 |ζ_j|² + β_j/2 |μ_j|²), the magnitude priors.
Without z or m the new means are the weighted means, where anything is seen at all; the authors'
layer gives NaN (keys) or 0 (values) elsewhere. Query heads of a group adapt a copy each.

Cost: plain attention, and two more products of n²·dim for every step; all pairs are in memory where
there are steps. Keys adapt to all queries, later ones too, so there is no causal form.
Reduces to softmax attention with magnitude priors, α = 1/√d and no steps.
Source: "Probabilistic Attention for Interactive Segmentation", by its authors' layer, where unequal
precisions bring no normaliser either. How many steps the paper took is not established: one here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports


@mechanism("probabilistic-attention", aliases=("probabilistic",), reduces_to=Reduction(
    "softmax", {"key_steps": 0, "magnitude_priors": True},
    lambda layer, plain: plain.load_state_dict(layer.state_dict()),
))  # fmt: skip
class Probabilistic(Attention):
    """Attention as inference in a mixture of Gaussians, with steps of expectation-maximisation.

    By keyword, `forward` takes alpha and beta [batch, kv_heads, keys] of each key; log_prior, of
    each pair, added to log π; initial values v [batch, kv_heads, queries, head_dim]; and values
    fixed [batch, kv_heads, queries, head_dim + 1], the last number 1 where there is one, else 0.
    """

    supports = Supports(
        causal=False, memory="quadratic", queries="all",
        extras=("alpha", "beta", "log_prior", "initial", "fixed"),
    )  # fmt: skip
    changes = ("normalize",)
    beyond = ("project: the score weighs values too, which are left for it",)

    alpha: float = option(
        "precision of queries; 1/√head_dim unless given", above=0,
        factory=lambda layer: layer.head_dim**-0.5,
    )  # fmt: skip
    beta: float = option("precision of values", default=0.0, at_least=0)
    magnitude_priors: bool = option("keys and values weigh by their magnitude", default=False)
    key_steps: int = option(
        "how often keys adapt; may be set after training", default=1, at_least=0
    )
    value_steps: int = option("how often values adapt where some are fixed", default=1, at_least=0)
    key_prior: float | None = option(
        "precision z that holds keys where they are", default=None, above=0
    )
    value_prior: float | None = option(
        "precision m that holds values where they are", default=None, above=0
    )

    def setup(self) -> None:
        """Precisions take the place of the scale."""
        super().setup()
        self.scale = 1.0

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and the Gaussians' means ζ and μ."""
        q, k, v = super().project(inputs)
        inputs.notes["means"] = v
        return q, k, v

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What multiplies to log w before any step, but for what is the same along a row."""
        return self.terms(q, k, inputs.notes["means"], inputs)

    def terms(self, q: Tensor, zeta: Tensor, mu: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What multiplies to log w for these means."""
        alpha, beta = self.precisions(zeta.shape[1], inputs)
        shape = (q.shape[0], inputs.notes["means"].shape[1], q.shape[2], mu.shape[-1])
        initial = _given(inputs, "initial", shape, q)
        v = q[..., :0] if initial is None else ops.repeated(initial, q.shape[1])
        by_size, has_v = float(self.magnitude_priors), float(initial is not None)
        own = (by_size - 1) * alpha * _square(zeta) + (by_size - has_v) * beta * _square(mu)
        # |q|² and |v|² differ along a row only by what a key's precisions have beyond the layer's.
        bias = (self.alpha - alpha, self.beta - beta, own)
        sizes = torch.cat((_square(q), _square(v), torch.ones_like(q[..., :1])), dim=-1) / 2
        k = torch.cat((alpha * zeta, beta * mu[..., : v.shape[-1]], *bias), dim=-1)
        return torch.cat((q, v, sizes), dim=-1), k

    def precisions(self, heads: int, inputs: Inputs) -> list[Tensor]:
        """α and β of every key, [batch, heads, keys, 1]."""
        means, found = inputs.notes["means"], []
        for name, own in (("alpha", self.alpha), ("beta", self.beta)):
            given = _given(inputs, name, means.shape[:3], means)
            each = torch.full_like(means[..., :1], own) if given is None else given[..., None]
            found.append(ops.repeated(each, heads))
        return found

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """log w after the last step, whose μ are left for the sum."""
        zeta, mu = self.adapted(q, k, inputs)
        inputs.notes["adapted"] = mu
        return self.log_weights(q, zeta, mu, inputs)

    def log_weights(self, q: Tensor, zeta: Tensor, mu: Tensor, inputs: Inputs) -> Tensor:
        """log w of these means, but for what is the same along a row."""
        q, k = self.terms(q, zeta, mu, inputs)
        scores, prior = ops.grouped_product(q, k.transpose(-1, -2)), inputs.extras.get("log_prior")
        return scores if prior is None else scores + prior.to(scores.dtype)

    def adapted(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """ζ and μ after the last step, a copy of each for every query head."""
        zeta, mu = (ops.repeated(x, q.shape[1]) for x in (k, inputs.notes["means"]))
        alpha, beta = self.precisions(q.shape[1], inputs)
        takes = torch.ones_like(q[..., :1], dtype=torch.bool)
        if inputs.context is None and inputs.valid_now is not None:
            takes = takes & inputs.valid_now[:, None, :, None]
        for _ in range(self.key_steps):
            scores = self.joint(q, zeta, mu, inputs)
            zeta = _drawn(zeta, q, scores, takes, alpha, self.key_prior)
        width = mu.shape[-1]
        shape = (q.shape[0], inputs.notes["means"].shape[1], q.shape[2], width + 1)
        fixed = _given(inputs, "fixed", shape, q)
        if fixed is not None:
            fixed = ops.repeated(fixed, q.shape[1])
            points, known = fixed[..., :width], takes & (fixed[..., width:] > 0)
            for _ in range(self.value_steps):
                scores = self.joint(q, zeta, mu, inputs)
                mu = _drawn(mu, points, scores, known, beta, self.value_prior)
        return zeta, mu

    def joint(self, q: Tensor, zeta: Tensor, mu: Tensor, inputs: Inputs) -> Tensor:
        """log w of these means with positions, −∞ where hidden."""
        scores, visible = self.log_weights(q, zeta, mu, inputs), inputs.visible(q, zeta)
        if (change := inputs.by_positions(self.score_mod, zeta.shape[2])) is not None:
            scores = change(scores, *ops.indices(scores, zeta.shape[2] - q.shape[2]))
        return scores if visible is None else scores.masked_fill(~visible, -torch.inf)

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Sums of the values after the last step."""
        return super().aggregate(weights, inputs.notes["adapted"], inputs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Fused where nothing adapts and no pair has a prior of its own."""
        if self.key_steps or not {"fixed", "log_prior"}.isdisjoint(inputs.extras):
            return self.aggregate(self.weigh(q, k, inputs), v, inputs)
        return self.fused(*self.features(q, k, inputs), v, inputs)


def _drawn(
    means: Tensor, points: Tensor, scores: Tensor, takes: Tensor, precision: Tensor,
    prior: float | Tensor | None,
) -> Tensor:  # fmt: skip
    """Means drawn to the points that take part, as far as the prior lets them go."""
    dead = scores.amax(-1, keepdim=True) == -torch.inf
    log_w = scores.masked_fill(dead, 0.0).log_softmax(-1)
    # In logs, since all weights of a far key may be too small to be divided by their sum.
    columns = log_w.masked_fill(dead | ~takes, -torch.inf).transpose(-1, -2)
    unseen = columns.amax(-1, keepdim=True) == -torch.inf
    moves = ops.softmax(columns) @ points - means
    if prior is not None:
        total = precision * columns.masked_fill(unseen, 0.0).logsumexp(-1, keepdim=True).exp()
        moves = moves * (total / (total + prior))
    return means + moves.masked_fill(unseen, 0.0)


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def _given(inputs: Inputs, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    given = inputs.extras.get(name)
    if given is not None and given.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(given.shape)}")
    return None if given is None else given.to(like.dtype)
