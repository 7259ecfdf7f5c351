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

from typing import Any

import torch
from torch import Tensor

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.masks import Mask


@mechanism("probabilistic-attention", aliases=("probabilistic",), reduces_to=Reduction(
    "softmax", {"key_steps": 0, "magnitude_priors": True},
    lambda layer, plain: plain.load_state_dict(layer.state_dict()),
))  # fmt: skip
class Probabilistic(Attention):
    """Attention as inference in a mixture of Gaussians, with steps of expectation-maximisation.

    By keyword, `forward` takes alpha and beta [batch, kv_heads, keys] of each key; log_prior, of
    each pair, added to log π; initial values v [batch, kv_heads, queries, head_dim]; and values
    fixed [batch, kv_heads, queries, head_dim + 1], the last number 1 where there is one, else 0.

    Args:
        alpha: precision of queries; 1/√head_dim unless given.
        beta: precision of values.
        magnitude_priors: whether keys and values weigh by their magnitude.
        key_steps: how often keys adapt; may be set after training.
        value_steps: how often values adapt where some are fixed.
        key_prior: precision z that holds keys where they are.
        value_prior: precision m that holds values where they are.
    """

    has_causal_form = False
    memory_law = "quadratic"
    extras = ("alpha", "beta", "log_prior", "initial", "fixed")

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, alpha: float | None = None, beta: float = 0.0,
        magnitude_priors: bool = False, key_steps: int = 1, value_steps: int = 1,
        key_prior: float | None = None, value_prior: float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        above = {"alpha": alpha, "key_prior": key_prior, "value_prior": value_prior}
        for name, value in above.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if min(beta, key_steps, value_steps) < 0:
            got = f"{beta}, {key_steps}, {value_steps}"
            raise ValueError(f"beta, key_steps and value_steps must be at least 0, got {got}")
        super().__init__(dim, heads, *args, **options)
        self.alpha, self.beta = self.scale if alpha is None else alpha, beta
        self.magnitude_priors = magnitude_priors
        self.key_steps, self.value_steps = key_steps, value_steps
        self.key_prior, self.value_prior = key_prior, value_prior

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries with their initial values; keys with all that makes a Gaussian: ζ, μ, α and β."""
        q, k, v = super().project(inputs)
        initial = _given(inputs, "initial", (*k.shape[:2], *q.shape[2:]), k)
        if initial is not None:
            q = torch.cat((q, ops.repeated(initial, q.shape[1])), dim=-1)
        for name, own in {"alpha": self.alpha, "beta": self.beta}.items():
            given = _given(inputs, name, k.shape[:3], v)
            each = torch.full_like(v[..., :1], own) if given is None else given[..., None]
            k = torch.cat((k, v, each) if name == "alpha" else (k, each), dim=-1)
        return q, k, v

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and ζ alone know where they stand."""
        d = self.head_dim
        placed = super().position(q[..., :d], k[..., :d], inputs)
        return torch.cat((placed[0], q[..., d:]), dim=-1), torch.cat(
            (placed[1], k[..., d:]), dim=-1
        )

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What multiplies to log w, but for what is the same along a row."""
        zeta, mu, alpha, beta = self.parts(k)
        q, v = q[..., : self.head_dim], q[..., self.head_dim :]
        by_size, has_v = float(self.magnitude_priors), float(v.shape[-1] > 0)
        own = (by_size - 1) * alpha * _square(zeta) + (by_size - has_v) * beta * _square(mu)
        # |q|² and |v|² differ along a row only by what a key's precisions have beyond the layer's.
        bias = (self.alpha - alpha, self.beta - beta, own)
        sizes = torch.cat((_square(q), _square(v), torch.ones_like(q[..., :1])), dim=-1) / 2
        k = torch.cat((alpha * zeta, beta * mu[..., : v.shape[-1]], *bias), dim=-1)
        return torch.cat((q, v, sizes), dim=-1), k

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """log w, but for what is the same along a row."""
        q, k = self.features(q, k, inputs)
        return ops.grouped_product(q, k.transpose(-1, -2))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Tensor:
        """Fused where nothing adapts; else the values, too, are those after the last step."""
        if self.key_steps or inputs.extras:
            return self.aggregate(*self.infer(q, k, mask, inputs))
        dropout = self.dropout if self.training else 0.0
        q, k = self.features(q, k, inputs)
        return ops.attend(q, k, v, mask=mask, score_mod=self.score_mod, scale=1.0, dropout=dropout)

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Weights after the last step."""
        return self.infer(q, k, mask, inputs)[0]

    def infer(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> tuple[Tensor, Tensor]:
        """Weights and values after the last step, both for every query head."""
        parts, width = [*self.parts(ops.repeated(k, q.shape[1]))], k.shape[-1] - self.head_dim - 2
        takes = torch.ones_like(q[..., :1], dtype=torch.bool)
        if inputs.context is None and inputs.valid_now is not None:
            takes = takes & inputs.valid_now[:, None, :, None]
        phases = [(0, self.key_steps, q[..., : self.head_dim], takes, self.key_prior)]
        fixed = _given(inputs, "fixed", (*k.shape[:2], q.shape[2], width + 1), q)
        if fixed is not None:
            fixed = ops.repeated(fixed, q.shape[1])
            known = takes & (fixed[..., width:] > 0)
            phases.append((1, self.value_steps, fixed[..., :width], known, self.value_prior))
        for at, steps, points, who, prior in phases:
            for _ in range(steps):
                scores = self.joint(q, torch.cat(parts, dim=-1), mask, inputs)
                parts[at] = _drawn(parts[at], points, scores, who, parts[at + 2], prior)
        return self.normalize(self.joint(q, torch.cat(parts, dim=-1), mask, inputs)), parts[1]

    def joint(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Scores with log π, −∞ where hidden."""
        scores, offset = self.score(q, k, inputs), k.shape[2] - q.shape[2]
        if self.score_mod is not None:
            scores = self.score_mod(scores, *ops.indices(scores, offset))
        if "log_prior" in inputs.extras:
            scores = scores + inputs.extras["log_prior"].to(scores.dtype)
        visible = ops.as_dense(mask, q.shape[2], k.shape[2], offset, q.device)
        return scores if visible is None else scores.masked_fill(~visible, -torch.inf)

    def parts(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ζ, μ, α and β of every key."""
        d = self.head_dim
        return k[..., :d], k[..., d:-2], k[..., -2:-1], k[..., -1:]


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
