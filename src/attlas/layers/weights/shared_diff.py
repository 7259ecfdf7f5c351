"""Shared DIFF attention: both maps' projections share a base and differ by low-rank updates.

    q_i = x (W_Q + A_i^Q B_i^Q),   k_i = x (W_K + A_i^K B_i^K),   i = 1, 2,   rank r
    weights = softmax(q₁ k₁ᵀ/√d) − λ · softmax(q₂ k₂ᵀ/√d), the rest as in differential attention

Cost: that of differential attention; queries and keys take dim·w + 2r (dim + w) parameters each
instead of 2·dim·w, w the width of all heads' queries or keys for one map.
Reduces to (1 − λ) softmax without the updates; equals the differential layer of the summed weights.
Source: "Shared DIFF Transformer". Established: the sum above, λ and the heads' norm. Not established:
the paper's r (here a head's width) and how updates start (here as any linear layer does, so that the
two maps differ from the first step); one base and update serve all heads of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.layers.weights.differential import Differential
from attlas.options import option


class SharedProjection(nn.Module):
    """Two projections of the same tokens to heads · head_dim: a base and one low-rank update each."""

    def __init__(self, dim: int, heads: int, head_dim: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = nn.Linear(dim, heads * head_dim, bias=bias)
        self.down = nn.Linear(dim, 2 * rank, bias=False)
        self.up = nn.Parameter(torch.empty(2, rank, heads * head_dim))
        nn.init.uniform_(self.up, -(rank**-0.5), rank**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, (heads two), tokens, head_dim], a head's first and second map side by side."""
        low = rearrange(self.down(x), "b t (two r) -> b t two r", two=2)
        both = self.base(x)[:, :, None] + einsum(low, self.up, "b t two r, two r w -> b t two w")
        joined: Tensor = rearrange(both, "b t two (h d) -> b (h two) t d", d=self.head_dim)
        return joined

    def summed(self) -> Tensor:
        """The weight [(heads two head_dim), dim] of the differential layer's projection."""
        down = rearrange(self.down.weight, "(two r) x -> two r x", two=2)
        both = self.base.weight + einsum(self.up, down, "two r w, two r x -> two w x")
        return rearrange(both, "two (h d) x -> (h two d) x", d=self.head_dim)


def _sum_updates(shared: SharedDiff, differential: Differential) -> None:
    """Give a differential layer the projections that base and updates sum to."""
    weights = {n: w for n, w in shared.state_dict().items() if n[:6] not in ("q_proj", "k_proj")}
    for name in ("q_proj", "k_proj"):
        projection: Any = getattr(shared, name)
        weights[f"{name}.weight"] = projection.summed()
        if projection.base.bias is not None:
            pair = repeat(projection.base.bias, "(h d) -> (h two d)", two=2, d=shared.head_dim)
            weights[f"{name}.bias"] = pair
    differential.load_state_dict(weights)


@mechanism("shared-diff-transformer", aliases=("shared-diff",), reduces_to=Reduction(
    "differential-transformer", {}, _sum_updates
))  # fmt: skip
class SharedDiff(Differential):
    """Differential attention whose two maps share their query and key projections' base."""

    claims = (
        Claim(
            "keeps the differential map's gain with fewer parameters",
            against=("differential-transformer",), task="noise(needles=2, pairs=8, keys=8)",
            split="32 pairs", margin=0.02,
        ),
    )  # fmt: skip

    beyond = ("output: heads are normed and scaled as in differential attention",)

    rank: int = option(
        "of the updates; a head's width unless given", factory=lambda layer: layer.head_dim,
        at_least=1,
    )  # fmt: skip

    def make_projections(self) -> None:
        """The differential layer's projections, those of queries and keys shared."""
        super().make_projections()
        width, rank = self.head_dim, self.rank
        self.q_proj, self.k_proj = (  # type: ignore[assignment]
            SharedProjection(self.dim, heads, width, rank, self.bias)
            for heads in (self.heads, self.kv_heads)
        )

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of both maps; values."""
        v = rearrange(self.v_proj(inputs.tokens), "b t (h d) -> b h t d", d=2 * self.head_dim)
        return self.q_proj(inputs.x), self.k_proj(inputs.tokens), v
