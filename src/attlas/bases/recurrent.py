"""Recurrent attention: a product of features takes the softmax's place, and a state that of all keys.

    weights_ts = φ(q_t)·φ(k_s) / Σ_r φ(q_t)·φ(k_r)
    S_t = S_{t−1} + φ(k_t) v_tᵀ      z_t = z_{t−1} + φ(k_t)      y_t = S_tᵀ φ(q_t) / z_tᵀ φ(q_t)

A mechanism of this family overrides `features` (the map φ) and `gates` (decays, the delta rule's
strength). All that is a recurrence is then in place: chunks, steps with a state of constant size in a
Transformers cache, padding, and the map of weights that the recurrence stands for.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypedDict, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports


class Gates(TypedDict, total=False):
    """How a state changes before and while it is written to, as `ops.recurrence` takes it."""

    log_decay: Tensor
    beta: Tensor
    low_rank: tuple[Tensor, Tensor]


class RecurrentAttention(Attention):
    """Attention by a product of features: any order of the product gives the same.

    Raises:
        ValueError: a position encoding that adds to scores, which there are none of.
    """

    supports: ClassVar[Supports] = Supports(cache="state")
    changes: ClassVar[tuple[str, ...]] = ("normalize", "aggregate")
    beyond: ClassVar[tuple[str, ...]] = (
        "score: features are multiplied, whatever stands for the exponential",
        "normalize: rows are divided by the sum of their features, if by anything",
        "aggregate: values are summed up in a state, from token to token",
    )
    #: Whether outputs are divided by the sum of their weights.
    normalized = True
    #: Added to that sum.
    eps = 0.0

    def setup(self) -> None:
        """Refuse positions that add to scores."""
        super().setup()
        if self.score_mod is not None:
            raise ValueError("position: a bias on scores means nothing without a softmax")
        self.scale = 1.0

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """Decays and strengths of writing for these keys (features already), as many heads as keys or
        as queries; none here."""
        return {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries width"]:
        """The recurrence from where the cache has left it; or all pairs, where they are needed.

        Raises:
            ValueError: a cache with a mask of pairs, which a state cannot tell from each other.
        """
        drops, along = self.training and self.dropout > 0, inputs.runs_along(self.pattern)
        weighed = None
        if drops or not along:
            if not along and inputs.cache is not None:
                raise ValueError("mask: a state in a cache takes causal masks and padding only")
            weighed = self.aggregate(self.weigh(q, k, inputs), v, inputs)
            if inputs.cache is None:
                return weighed
        out = self.recur(q, k, v, inputs)
        return out if weighed is None else weighed

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries width"]:
        """The recurrence from where the cache has left it, which gets the state behind it."""
        q, k, gates = self.terms(q, k, inputs)
        v = ops.repeated(v, q.shape[1])
        if (valid := inputs.valid_now) is not None:  # whose padding may hold anything
            v = v.masked_fill(~valid[:, None, :, None], 0.0)
        out, state = ops.recurrence(
            q, k, v, **gates, scale=self.scale, normalize=self.normalized, eps=self.eps,
            causal=inputs.looks_back(self.pattern), initial_state=inputs.recall("state"),
        )  # fmt: skip
        if state is not None:
            inputs.remember("state", state)
        return out

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The map that the recurrence stands for: what it gives for values that tell tokens apart.

        Raises:
            ValueError: a cache, whose state tells no more which token wrote what.
        """
        inputs.refuse_weights(inputs.recall("state") is not None)
        visible = inputs.visible(q, k)
        dtype = q.dtype
        q, k, gates = self.terms(q, k, inputs)
        tokens = torch.eye(k.shape[2], dtype=q.dtype, device=q.device)
        each = tokens.expand(*k.shape[:2], -1, -1)
        weights, _ = ops.recurrence(
            q, k, each, **gates, scale=self.scale, causal=inputs.looks_back(self.pattern), form="parallel"
        )
        if visible is not None:
            weights = weights.masked_fill(~visible, 0.0)
        if not self.normalized:
            return weights.to(dtype)
        total = weights.sum(-1, keepdim=True) + self.eps
        return ops.divided(weights, total).to(dtype)

    def terms(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Gates]:
        """Features, one key for every query head, and gates; at padding, nothing happens to a state."""
        q, k = self.features(q, k, inputs)
        gates, valid = self.gates(k, inputs), inputs.valid_now
        k, gates = ops.repeated(k, q.shape[1]), _repeated(gates, q.shape[1])
        if valid is not None:
            k, gates = k.masked_fill(~valid[:, None, :, None], 0.0), _only(valid, gates)
        return q, k, gates


class WideValues(RecurrentAttention):
    """Recurrent attention whose values have a width of their own: no product needs that of the keys."""

    beyond: ClassVar[tuple[str, ...]] = (
        "project: the published program lets values have a width of their own",
    )

    value_dim: int = option(
        "width of a head's values; head_dim unless given", at_least=1,
        factory=lambda layer: layer.head_dim,
    )  # fmt: skip

    def make_projections(self) -> None:
        """Projections, those of values of their own width."""
        super().make_projections()
        self.v_proj = nn.Linear(self.dim, self.kv_heads * self.value_dim, bias=self.bias)
        self.o_proj = nn.Linear(self.heads * self.value_dim, self.dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of their own width."""
        q, k = self.q_proj(inputs.x), self.k_proj(inputs.tokens)
        v = self.v_proj(inputs.tokens).unflatten(-1, (-1, self.value_dim)).transpose(1, 2)
        return self.split_heads(q), self.split_heads(k), v


def _repeated(gates: Gates, heads: int) -> Gates:
    """Gates of key heads for each query head."""
    each: dict[str, Any] = {**gates}
    for name, gate in each.items():
        if isinstance(gate, tuple):
            each[name] = tuple(ops.repeated(x, heads) for x in gate)
        elif gate.ndim > 1:
            each[name] = ops.repeated(gate, heads)
    return cast("Gates", each)


def _only(valid: Tensor, gates: Gates) -> Gates:
    """Gates that hold at valid tokens alone."""
    kept: Gates = {}
    padding = ~valid[:, None, :]
    if (beta := gates.get("beta")) is not None:
        kept["beta"] = beta.masked_fill(padding, 0.0)
    if (pair := gates.get("low_rank")) is not None:
        a, b = (x.masked_fill(padding[..., None], 0.0) for x in pair)
        kept["low_rank"] = (a, b)
    if (decay := gates.get("log_decay")) is not None:
        if decay.ndim == 1:  # one number a head, now one a token
            decay = decay[None, :, None].expand(valid.shape[0], -1, valid.shape[1])
        padding = padding if decay.ndim == 3 else padding[..., None]
        kept["log_decay"] = decay.masked_fill(padding, 0.0)
    return kept
