"""Local linear attention: every query fits a line through the values around it, and takes its own point.

    w_ij  = exp(q_i·k_j / √d)      ω_i = Σ_j w_ij      p_ij = w_ij / ω_i      how near a key is to a query
    b, W  = argmin Σ_j w_ij |v_j − b − W (k_j − q_i)|² + λ |W|²               y_i = b
    k̄_i   = Σ_j p_ij k_j      C_i = Σ_j p_ij (k_j − k̄_i)(k_j − k̄_i)ᵀ
    y_i   = Σ_j p_ij (1 − r_i·(k_j − k̄_i)) v_j                               (C_i + λ/ω_i) r_i = k̄_i − q_i

Softmax attention is the constant that fits best; the slope takes out what keys that all lie on one side
of the query bias it by. The weights of a query sum to 1, and some may be negative. With ρ the slope of
keys seen from the query, p (1 − z·ρ) / (1 − ρ·Σ p z) for z = k − q, they are the same numbers; seen from
k̄ nothing cancels. r is found by conjugate gradients, whose products with C are two products with the
keys: no matrix of d × d is made for any query. Gradients follow from the solution alone.

λ stands beside w, whose sum may be anything: a query that sees much holds a slope back little. With
`relative` it stands beside p, which sum to 1, as in the authors' later program (Parallax). As λ/ω may be
small all this is done in float64, where the device has it, and λ/ω is taken for 1e-10 at least.

Cost: 2·n²·d multiply-adds for p and for the sum, and 4·n²·d a step, at most `steps`; 128 queries at a
time, made again in the backward pass, so that memory is linear in n.
Reduces to softmax attention at λ = ∞; with constant weights it is ridge regression.
Source: "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time
Regression", by a reader's note: its authors published no program. Which λ the paper takes is not known
to us.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attlas import masks, ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.options import option
from attlas.positions import ScoreMod
from attlas.tracing import stretches, traced

#: Queries whose weights are in memory at a time.
QUERIES = 128
#: λ/ω at least, and at most: below rounding would decide, and above no slope is left.
LEAST, MOST = 1e-10, 1e20


@mechanism("local-linear-attention", reduces_to=Reduction(
    "softmax", {"ridge": math.inf}, lambda layer, plain: plain.load_state_dict(layer.state_dict())
))  # fmt: skip
class LocalLinear(Attention):
    """Attention that fits a slope for every query besides the mean of the values."""

    changes = ("score", "aggregate")  # a line is fitted instead of a mean, its slope within weights
    beyond = ("normalize: the slope is worked out from weights that sum to 1, and changes them",)

    ridge: float = option(
        "λ, how much a slope must explain; infinite for none", default=0.1, above=0
    )
    relative: bool = option(
        "λ stands beside weights that sum to 1, instead of exp(q·k/√d)", default=False
    )
    steps: int = option(
        "most steps of the conjugate gradients; four times head_dim unless given", at_least=1,
        factory=lambda layer: 4 * layer.head_dim,
    )  # fmt: skip

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries width"]:
        """Some queries at a time, of whose weights none is kept."""

        def some(
            q: Tensor, k: Tensor, v: Tensor, pairs: Mask | Tensor | None, offset: int
        ) -> Tensor:
            weights = self.weights_of(q, k, pairs, offset, change).to(v.dtype)
            return self.aggregate(weights, v, inputs)

        change = inputs.by_positions(self.score_mod, k.shape[2])
        parts, before, pairs = [], k.shape[2] - q.shape[2], inputs.pairs
        for rows in stretches(q.shape[2], QUERIES):
            # Of causal queries all later keys are hidden, and left out.
            seen = slice(before + rows.stop if pairs == masks.causal else None)
            cut = isinstance(pairs, Tensor) and pairs.shape[2] > 1
            own = pairs[:, :, rows] if cut else pairs  # type: ignore[index]
            call = q[:, :, rows], k[:, :, seen], v[:, :, seen], own, before + rows.start
            parts.append(ops.recomputed(some, *call))
        return torch.cat(parts, dim=2)

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The weights of all pairs."""
        offset, change = k.shape[2] - q.shape[2], inputs.by_positions(self.score_mod, k.shape[2])
        return self.weights_of(q, k, inputs.pairs, offset, change).to(q.dtype)

    @ops.exact
    def weights_of(
        self, q: Tensor, k: Tensor, pairs: Mask | Tensor | None, offset: int, change: ScoreMod | None
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Weights of queries of which `offset` keys stand before the first, in float64 if that can be."""
        dtype = torch.float32 if q.device.type == "mps" else torch.float64
        q, k = q.to(dtype), k.to(dtype)
        scores = ops.scores_of(
            q, k, scale=self.scale, mask=pairs, score_mod=change, q_offset=offset
        )
        ridge = torch.full_like(scores[..., :1], math.log(min(self.ridge, MOST)))
        if not self.relative:
            blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
            ridge = ridge - scores.masked_fill(blind, 0.0).logsumexp(dim=-1, keepdim=True)
        ridge = ridge.clamp(math.log(LEAST), math.log(MOST)).exp()
        p = ops.softmax(scores)
        return sloped(p, k, slope(p, k, q, ridge, self.steps))


def sloped(
    p: Float[Tensor, "batch heads queries keys"], k: Float[Tensor, "batch kv_heads keys width"],
    r: Float[Tensor, "batch heads queries width"],
) -> Float[Tensor, "batch heads queries keys"]:  # fmt: skip
    """p (1 − r·(k − k̄))."""
    along = ops.grouped_product(r, k.transpose(-1, -2))
    return p * (1 - along + (p * along).sum(-1, keepdim=True))


def slope(
    p: Float[Tensor, "batch heads queries keys"], k: Float[Tensor, "batch kv_heads keys width"],
    q: Float[Tensor, "batch heads queries width"], ridge: Float[Tensor, "batch heads queries 1"],
    steps: int,
) -> Float[Tensor, "batch heads queries width"]:  # fmt: skip
    """r with (C + λ) r = k̄ − q, of each query's own λ."""
    solution: Tensor = _Solve.apply(p, k, ops.grouped_product(p, k) - q, ridge, steps)  # type: ignore[no-untyped-call]
    return solution / ridge


class _Solve(torch.autograd.Function):
    """y with (C/λ + 1) y = b, and its gradients by one more such system."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, k: Tensor, b: Tensor, ridge: Tensor, steps: int) -> Tensor:
        return _conjugate_gradients(p, k, b, ridge, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        p, k, _, ridge, ctx.steps = inputs
        ctx.save_for_backward(p, k, ridge, output)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        p, k, ridge, y = ctx.saved_tensors
        d_b = _Solve.apply(p, k, d_y, ridge, ctx.steps)  # type: ignore[no-untyped-call]
        # What −d_b is worth of the left side, through p, k and λ.
        back = ops.grouped_product(-d_b / ridge, k.transpose(-1, -2))
        along = ops.grouped_product(y, k.transpose(-1, -2))
        mean, d_mean = (p * along).sum(-1, keepdim=True), (p * back).sum(-1, keepdim=True)
        apart = p * (along - mean)
        d_p = back * (along - mean) - d_mean * along
        at_keys = apart.mT @ (-d_b / ridge) + (p * (back - d_mean)).mT @ y
        d_k = at_keys.unflatten(1, (k.shape[1], -1)).sum(2)
        d_ridge = (d_b * ops.grouped_product(apart, k)).sum(-1, keepdim=True) / ridge.square()
        return d_p, d_k, d_b, d_ridge, None


def _left_side(p: Tensor, k: Tensor, y: Tensor, ridge: Tensor) -> Tensor:
    """(C/λ + 1) y."""
    along = ops.grouped_product(y, k.transpose(-1, -2))
    apart = p * (along - (p * along).sum(-1, keepdim=True))
    return ops.grouped_product(apart, k) / ridge + y


def _conjugate_gradients(p: Tensor, k: Tensor, b: Tensor, ridge: Tensor, steps: int) -> Tensor:
    """The solution of every query's own system; those that are exact enough stand still."""
    y, rest, way = torch.zeros_like(b), b, b
    length = (rest * rest).sum(-1, keepdim=True)
    enough = length * torch.finfo(b.dtype).eps ** 2
    for _ in range(steps):
        going = length > enough
        if not traced() and not going.any():
            break
        moved = _left_side(p, k, way, ridge)
        bent = (way * moved).sum(-1, keepdim=True)
        far = torch.where(going, length / bent.where(going, 1.0), 0.0)
        y, rest = y + far * way, rest - far * moved
        left = (rest * rest).sum(-1, keepdim=True)
        way = rest + torch.where(going, left / length.where(going, 1.0), 0.0) * way
        length = left
    return y
