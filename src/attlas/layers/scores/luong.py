"""Luong attention: a decoder's state scores the source, and both make an attentional state.

    score(h, s) = h·s (dot)     h·W s (general)     v·tanh(W_h h + W_s s) (concat)
    a = softmax(score),  c = a s,  y = tanh(W [c; h])
    local: a · exp(−(s − p)² / 2σ²) where |s − p| ≤ D, σ = D / 2;
           p = t (monotonic)   or   p = S · sigmoid(v_p·tanh(W_p h)) (predictive), S source tokens

There is one head, which reads states as they are. The Gaussian of the predictive form comes after
the softmax, which runs over the window, and is not normalised again. Input feeding is the caller's:
y goes into the decoder's next input.

Cost: n·dim multiply-adds for a query (concat: as many tanh); windows around p hold all pairs.
Reduces to global attention when the window covers the source and σ is infinite.
Source: "Effective Approaches to Attention-based Neural Machine Translation". The concat score has
OpenNMT's two matrices, which side by side are the paper's one; the paper has no bias anywhere.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.options import option
from attlas.supports import Supports


@mechanism("luong-attention", aliases=("luong",), example={"heads": 1})
class Luong(Attention):
    """One-headed attention of a decoder's states to a source."""

    supports = Supports(causal=False, position=False, memory="quadratic")
    beyond = ("project: a score has what projections it needs, and values are the source itself",)

    heads: int = option("query heads: one", default=1, at_least=1, kw_only=False)
    scoring: Literal["dot", "general", "concat"] = option("which score", default="general")
    alignment: Literal["global", "monotonic", "predictive"] = option(
        "all of the source, or a window around p", default="global"
    )
    window: int = option("D, source tokens to either side of p", default=10, at_least=1)
    sigma: float = option(
        "of the predictive form's Gaussian, in tokens; D / 2 unless given", above=0,
        factory=lambda layer: layer.window / 2,
    )  # fmt: skip
    context_dim: int = option(
        "width of the source; dim unless given", factory=lambda layer: layer.dim, at_least=1
    )
    score_dim: int = option(
        "width of the concat score; dim unless given", factory=lambda layer: layer.dim, at_least=1
    )

    def setup(self) -> None:
        """Refuse other heads than a single one as wide as the layer.

        Raises:
            ValueError: such heads, or the dot product with a source of another width.
        """
        super().setup()
        if self.scoring == "dot" and self.context_dim != self.dim:
            raise ValueError(
                f"scoring='dot' takes a source as wide as dim={self.dim}, got {self.context_dim}; "
                "'general' and 'concat' take any"
            )
        if self.heads != 1 or self.head_dim != self.dim:
            raise ValueError(f"heads must be 1 and head_dim as wide as dim, got {self.heads}")

    def make_projections(self) -> None:
        """What the score, the alignment and the attentional state need."""
        if self.scoring == "general":
            self.q_proj = nn.Linear(self.dim, self.context_dim, bias=False)
        elif self.scoring == "concat":
            self.q_proj = nn.Linear(self.dim, self.score_dim, bias=False)
            self.k_proj = nn.Linear(self.context_dim, self.score_dim, bias=False)
            self.v_score = nn.Linear(self.score_dim, 1, bias=False)
        if self.alignment == "predictive":
            self.p_proj = nn.Linear(self.dim, self.dim, bias=False)
            self.v_p = nn.Linear(self.dim, 1, bias=False)
        self.o_proj = nn.Linear(self.context_dim + self.dim, self.dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """States as the score reads them; values are the source itself."""
        q, k = inputs.x, inputs.tokens
        if self.scoring != "dot":
            q = self.q_proj(q)
        if self.scoring == "concat":
            k = self.k_proj(k)
        return q[:, None], k[:, None], inputs.tokens[:, None]

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Scores, not scaled."""
        if self.scoring == "concat":
            scores: Tensor = self.v_score((q[..., None, :] + k[..., None, :, :]).tanh())
            return scores.squeeze(-1)
        return q @ k.transpose(-1, -2)

    def mask(self, q: Tensor, k: Tensor, inputs: Inputs) -> Mask | Tensor | None:
        """The source, or its window around p."""
        pairs = super().mask(q, k, inputs)
        if self.alignment == "global":
            return pairs
        near: Tensor = self.distance(inputs).abs() <= self.window
        shown = ops.as_dense(pairs, q.shape[2], k.shape[2], k.shape[2] - q.shape[2], q.device)
        return near if shown is None else near & shown

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """Weights, in the predictive form times the Gaussian around p."""
        weights = super().normalize(scores, inputs)
        if self.alignment != "predictive":
            return weights
        return weights * (-0.5 * (self.distance(inputs) / self.sigma).square()).exp().to(weights)

    def distance(self, inputs: Inputs) -> Tensor:
        """s − p [batch, 1, queries, keys]; padding is no place."""
        places: Tensor = torch.atleast_2d(
            inputs.positions_of(inputs.key_positions.shape[-1])
        )[:, None, None, :]
        if self.alignment == "monotonic":
            steps: Tensor = torch.atleast_2d(inputs.positions)[:, None, :, None]
            return places - steps
        if "p" not in inputs.notes:
            shares = self.v_p(self.p_proj(inputs.x).tanh()).sigmoid()
            valid = inputs.valid
            length = places.shape[-1] if valid is None else valid.sum(-1)[:, None, None]
            # In half precision whole places beyond 256 would run together.
            exact = shares.to(torch.promote_types(shares.dtype, torch.float32))
            inputs.notes["p"] = (length * exact)[:, None]
        return places - inputs.notes["p"]

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """The attentional state."""
        y: Tensor = self.o_proj(torch.cat((heads[:, 0], inputs.x), dim=-1)).tanh()
        return y
