"""Luong attention: a decoder's state scores the source, and both make an attentional state.

    score(h, s) = h·s (dot)     h·W s (general)     v·tanh(W_h h + W_s s) (concat)
    a = softmax(score),  c = a s,  y = tanh(W [c; h])
    local: a · exp(−(s − p)² / 2σ²) where |s − p| ≤ D, σ = D / 2;
           p = t (monotonic)   or   p = S · sigmoid(v_p·tanh(W_p h)) (predictive), S source tokens

There is one head, which reads states as they are. The Gaussian of the predictive form comes after
the softmax, which runs over the window, and is not normalised again. Input feeding is the caller's:
y goes into the decoder's next input.

Cost: n·dim multiply-adds for a query (concat: as many tanh); the weights are held, quadratic memory.
Reduces to global attention when the window covers the source and σ is infinite.
Source: "Effective Approaches to Attention-based Neural Machine Translation". The concat score has
OpenNMT's two matrices, which side by side are the paper's one; the paper has no bias anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.masks import Mask

SCORES, ALIGNMENTS = ("dot", "general", "concat"), ("global", "monotonic", "predictive")


@mechanism("luong-attention", aliases=("luong",), example={"heads": 1})
class Luong(Attention):
    """One-headed attention of a decoder's states to a source.

    Args:
        scoring: dot, general or concat.
        alignment: global, monotonic or predictive.
        window: D, source tokens to either side of p.
        sigma: of the predictive form's Gaussian; D / 2 unless given.
        score_dim: width of the concat score; dim unless given.
    """

    has_causal_form = False
    has_own_position = True
    memory_law = "quadratic"

    def __init__(
        self, dim: int, heads: int = 1, *args: Any, scoring: str = "general",
        alignment: str = "global", window: int = 10, sigma: float | None = None,
        score_dim: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if scoring not in SCORES:
            raise ValueError(f"scoring must be one of {SCORES}, got {scoring!r}")
        if alignment not in ALIGNMENTS:
            raise ValueError(f"alignment must be one of {ALIGNMENTS}, got {alignment!r}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if sigma is not None and sigma <= 0:
            raise ValueError(f"sigma must be above 0, got {sigma}")
        self.scoring, self.alignment, self.window = scoring, alignment, window
        self.sigma = window / 2 if sigma is None else sigma
        self.score_dim = score_dim
        super().__init__(dim, heads, *args, **options)

    def make_projections(self) -> None:
        """What the score, the alignment and the attentional state need."""
        if self.heads != 1 or self.head_dim != self.dim:
            raise ValueError(f"heads must be 1 and head_dim as wide as dim, got {self.heads}")
        if self.scoring == "general":
            self.q_proj = nn.Linear(self.dim, self.dim, bias=False)
        elif self.scoring == "concat":
            width = self.score_dim or self.dim
            self.q_proj = nn.Linear(self.dim, width, bias=False)
            self.k_proj = nn.Linear(self.dim, width, bias=False)
            self.v_score = nn.Linear(width, 1, bias=False)
        if self.alignment == "predictive":
            self.p_proj = nn.Linear(self.dim, self.dim, bias=False)
            self.v_p = nn.Linear(self.dim, 1, bias=False)
        self.o_proj = nn.Linear(2 * self.dim, self.dim, bias=self.bias)

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

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Weights over the source, or over the window around p."""
        visible = inputs.visible(q, k)
        distance = None if self.alignment == "global" else self.distance(inputs)
        if distance is not None:
            near = distance.abs() <= self.window
            visible = near if visible is None else visible & near
        scores = self.score(q, k, inputs)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        weights = self.normalize(scores)
        if self.alignment != "predictive" or distance is None:
            return weights
        return weights * (-0.5 * (distance / self.sigma).square()).exp().to(weights.dtype)

    def distance(self, inputs: Inputs) -> Tensor:
        """s − p [batch, 1, queries, keys]; padding is no place."""
        places: Tensor = torch.atleast_2d(inputs.key_positions)[:, None, None, :]
        if self.alignment == "monotonic":
            steps: Tensor = torch.atleast_2d(inputs.positions)[:, None, :, None]
            return places - steps
        shares = self.v_p(self.p_proj(inputs.x).tanh()).sigmoid()
        length = places.shape[-1] if inputs.valid is None else inputs.valid.sum(-1)[:, None, None]
        # In half precision whole places beyond 256 would run together.
        exact = shares.to(torch.promote_types(shares.dtype, torch.float32))
        distances: Tensor = places - (length * exact)[:, None]
        return distances

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """The attentional state."""
        y: Tensor = self.o_proj(torch.cat((heads[:, 0], inputs.x), dim=-1)).tanh()
        return y
