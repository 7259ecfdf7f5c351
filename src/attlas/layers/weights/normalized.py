"""Normalized attention: weights are standardised logits, free of the simplex of probabilities.

    z = (s − mean s) / (std s + ε) over a row's visible keys,   s = q kᵀ
    weights = g z + b, g and b one a head;   std divides by their number n
    y = W_O GELU(LayerNorm(concat_h weights_h v_h))
    baselines: y_i = Σ_j x_j (sum-pooling), max_j x_j (max-pooling) over the visible keys j

Where all queries see the same keys (no mask, or padding alone) no n² is needed: with centred keys k̃,
Σ_j s̃_ij v_j = q_i Σ_j k̃_j v_jᵀ and var s = qᵀ (Σ k̃ k̃ᵀ / n) q.

Cost: there n·dim·head_dim multiply-adds, else plain attention's, a block of queries at a time.
Reduces to nothing simpler: weights may be negative, and sum to n b.
Source: "Normalized Attention Without Probability Cage", with its program's undivided s and tanh GELU.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports
from attlas.tracing import any_length


@mechanism("normalized-attention", aliases=("nap",))
class Normalized(Attention):
    """Attention with standardised logits as weights."""

    supports = Supports()
    beyond = ("output: the published layer has a norm and GELU between heads and projection",)

    eps: float = option("ε, added to the standard deviation", default=1e-3, above=0)
    divided: bool = option("whether logits are divided by √d first", default=False)
    normed: bool = option("whether the joined heads have a layer norm", default=True, alias="norm")
    nonlinearity: bool = option("whether GELU comes after it", default=True)

    def setup(self) -> None:
        """g, b and the norm."""
        super().setup()
        self.scale = self.scale if self.divided else 1.0
        self.gain = nn.Parameter(torch.ones(self.heads, 1, 1))
        self.shift = nn.Parameter(torch.zeros(self.heads, 1, 1))
        width = self.heads * self.head_dim
        self.norm = nn.LayerNorm(width, eps=1e-3) if self.normed else nn.Identity()

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """g z + b at visible keys, 0 at hidden ones."""
        visible = scores != -torch.inf
        count = visible.sum(-1, keepdim=True).clamp(min=1)
        s = scores.masked_fill(~visible, 0.0).to(torch.promote_types(scores.dtype, torch.float32))
        centred = (s - s.sum(-1, keepdim=True) / count) * visible
        std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / count.to(s.dtype).sqrt()
        weights = self.gain * (centred / (std + self.eps)) + self.shift
        return torch.where(visible, weights, 0.0).to(scores.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """By sums over keys where all queries see the same ones, else by the map."""
        alike = inputs.pairs is None or (self.pattern is None and inputs.valid is not None)
        if not alike or self.score_mod is not None or (self.training and self.dropout):
            return super().attend(q, k, v, inputs)
        return self.by_sums(q, k, v, inputs)

    @ops.exact
    def by_sums(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """All queries' outputs from the keys' covariance and their product with the values."""
        queries, keys, values = (ops.wide(x) for x in (self.scale * q, k, v))
        valid = values.new_ones(1, 1, k.shape[2], 1)
        if inputs.valid is not None:
            valid = valid * inputs.valid[:, None, -k.shape[2] :, None]
        count = valid.sum(2, keepdim=True).clamp(min=1)
        keys = (keys - (keys * valid).sum(2, keepdim=True) / count) * valid
        spread, mixed, total = (ops.repeated(x, q.shape[1]) for x in (
            keys.mT @ keys / count, keys.mT @ values, (values * valid).sum(2, keepdim=True)
        ))  # fmt: skip
        variance = ((queries @ spread) * queries).sum(-1, keepdim=True)
        flat = variance <= 0  # where the root's slope is infinite
        std = variance.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)
        out: Tensor = self.gain * (queries @ mixed) / (std + self.eps) + self.shift * total
        return out.to(v.dtype)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Joined heads normed and bent before the projection."""
        hidden = self.norm(rearrange(heads, "b h t d -> b t (h d)"))
        y: Tensor = self.o_proj(gelu(hidden, approximate="tanh") if self.nonlinearity else hidden)
        return y


@mechanism("sum-pooling", paper="normalized-attention")
class SumPooling(Attention):
    """Every query gets the sum of the tokens that it sees; nothing is trained."""

    supports = Supports(position=False)
    beyond: ClassVar[tuple[str, ...]] = (
        "project: heads are slices of the tokens",
        "output: slices are joined without a projection",
    )
    expected_failures: ClassVar[dict[str, str]] = dict.fromkeys(
        ("finite-differences", "gradients-reach", "no-trace"), "it has no parameter to train"
    )

    def make_projections(self) -> None:
        """No projections: heads are slices of the tokens."""
        if self.bias or {self.kv_heads, self.dim / self.head_dim} != {self.heads}:
            raise ValueError("bias, kv_heads and head_dim: pooling has no projections")

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens as values; no queries or keys but a channel each, which nothing reads."""
        q, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (inputs.x, inputs.tokens)
        )
        return q[..., :1], v[..., :1], v

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """1 at visible keys, 0 at hidden ones."""
        return (scores != -torch.inf).to(scores.dtype)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Slices joined again."""
        return heads.transpose(1, 2).flatten(2)


@mechanism("max-pooling", paper="normalized-attention")
class MaxPooling(SumPooling):
    """Every query gets, channel by channel, the largest of the tokens that it sees."""

    beyond = ("aggregate: the largest takes the place of the sum",)

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Largest visible value, 0 where nothing is visible; a query at a time bounds the memory."""
        weights = torch.dropout(weights, self.dropout, self.training)
        rows = weights.split(1, dim=2) if not any_length(weights.shape[2]) else [weights]
        largest = [
            v[:, :, None].masked_fill(row[..., None] == 0, -torch.inf).amax(3) for row in rows
        ]
        return torch.cat(largest, dim=2).nan_to_num(neginf=0.0, nan=torch.nan, posinf=torch.inf)
