"""DINT attention: the difference of two maps, plus the mean map that gives its rows back their sum.

    weights = A₁ − λ A₂ + λ G,   A = softmax(q kᵀ/√d),   λ as in the differential transformer
    G_i ∝ Σ_m A₁[m] over the queries m that i may see, cut to the keys that i may see

Without a mask G is the mean over all queries; under a causal mask the mean over the queries up to i.
In both G·V is the (cumulative) mean of A₁V, so that two maps and linear memory are enough; decoding
remembers the sum and the count. Padding takes no part.

Cost: that of differential attention. Masks other than causal and padding: n² memory, n³ operations.
Reduces to softmax attention (then normalised) at λ = 0. Rows of the map sum to 1 for every λ.
Source: "DINT Transformer". The authors gave no program; their text fixes G without a mask, and that
rows sum to 1; a third party's program has the same G. That each query averages over those it may see
is the reading that keeps both under a mask. Heads are normed and scaled as in differential attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from attlas import ops
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.layers.weights.differential import Differential


@mechanism("dint-transformer", aliases=("dint",))
class Dint(Differential):
    """Differential attention with an integral term, which takes no options of its own."""

    claims = (
        Claim(
            "adds to the differential map what the whole sequence attends to, and retrieves "
            "better than it",
            also="noise", against=("differential-transformer", "softmax"),
            task="noise(needles=2, pairs=8, keys=8)", split="32 pairs",
        ),
    )  # fmt: skip

    supports = replace(Differential.supports, remembers=True, queries="all")
    beyond = ("output: heads are normed and scaled as in differential attention",)
    expected_failures: ClassVar[dict[str, str]] = {"static-cache": "no room for G's running sum"}

    def coefficients(self, inputs: Inputs) -> Sequence[float | Tensor]:
        """1, −λ and λ, of A₁, A₂ and G."""
        return 1.0, -self.lambda_, self.lambda_

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """A₁ − λ A₂ + λ G, of all queries at once."""
        first, second = self.each_map(q, k, inputs)
        return self.summed((first, second, self.mean_map(first, q, k, inputs)), inputs)

    def mean_map(self, first: Tensor, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """G [batch, heads, queries or 1, keys]."""
        visible = inputs.visible(q, k)
        if visible is None:
            return first.mean(2, keepdim=True)
        visible = visible.to(first.dtype)
        own = inputs.context is None
        seen = visible * (visible @ first if own else first.sum(2, keepdim=True))
        total = seen.sum(-1, keepdim=True)
        return ops.divided(seen, total)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """What both maps give, and the mean of what the first gives.

        Raises:
            ValueError: a cache with a mask for which running sums do not tell G.
        """
        if not inputs.runs_along(self.pattern):
            if inputs.cache is not None:
                raise ValueError("mask: with a cache DINT takes causal masks and padding alone")
            return self.aggregate(self.weigh(q, k, inputs), v, inputs)
        first, second = self.outs(q, k, v, inputs)
        return self.summed((first, second, self.mean_of(first, inputs)), inputs)

    def mean_of(self, first: Tensor, inputs: Inputs) -> Tensor:
        """G·V [batch, heads, queries or 1, width]: the mean of A₁V, up to each query if causal."""
        dtype = torch.promote_types(first.dtype, torch.float32)
        count = first.new_ones(first.shape[0], 1, first.shape[2], 1, dtype=dtype)
        if (valid := inputs.valid_now) is not None and inputs.context is None:
            count = count * valid[:, None, :, None]
            first = first * valid[:, None, :, None]
        if not inputs.looks_back(self.pattern):
            sums = first.sum(2, keepdim=True, dtype=dtype)
            return (sums / count.sum(2, keepdim=True).clamp(min=1)).to(first)
        before, counted = inputs.recall("dint-sum"), inputs.recall("dint-count")
        count = count.cumsum(2) + (0 if counted is None else counted)
        mean, sums = ops.running_mean(first, count.clamp(min=1), before)
        inputs.remember("dint-sum", sums)
        inputs.remember("dint-count", count[:, :, -1:])
        return mean
