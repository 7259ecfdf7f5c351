"""Softplus attention (LSSA) and its sharpened form (LSSAR): positive weights, divided by their sum.

    s = log d · log n_i · (q_i/|q_i|)·(k_j/|k_j|),   a = softplus(s) / Σ_visible softplus(s)
    LSSAR: weights = r / Σ r,   r = relu(n_i a − o_i)^p,   p = 15,   o_i = 1 where n_i > 3, else 0

n_i counts the keys that query i sees. LSSA is softmax attention with log softplus(s) for its scores.
Where all weights of a row are equal, none is above average: LSSAR keeps them.

Cost: LSSA that of plain attention; LSSAR a pass more over the n² weights. Memory is linear.
Reduces to softmax attention with exp for softplus and q·k/√d for s.
Source: "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models", in
others' retellings of its revised text; o_i for the first three rows in a third party's program alone.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option
from attlas.positions import ScoreMod
from attlas.positions.base import placeless
from attlas.supports import Supports


@mechanism(
    "length-scaled-softplus-attention", paper="softplus-reweighted-attention", aliases=("lssa",),
    reduces_to=Reduction("softmax", {"activation": "exp", "scaled": False}, lambda layer, plain: (
        plain.load_state_dict(layer.state_dict())
    )),
)  # fmt: skip
class Softplus(Attention):
    """Attention whose weights are softplus of length-scaled cosines, normalised."""

    #: Softplus takes the exponential's place: through its logarithm, in `score_mod`.
    changes = ("normalize",)

    activation: Literal["softplus", "exp"] = option(
        "what makes scores positive", default="softplus"
    )
    scaled: bool = option("cosines times log d · log n; else q·k/√d", default=True)

    def setup(self) -> None:
        """log d takes the place of 1/√d."""
        super().setup()
        if self.scaled and self.head_dim < 2:
            raise ValueError(f"head_dim must be at least 2 for log d, got {self.head_dim}")
        self.scale = math.log(self.head_dim) if self.scaled else self.scale

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Keys of unit length, and queries of length log n."""
        if not self.scaled:
            return q, k
        count = self.count(q, k, inputs).clamp(min=1).to(torch.float64)
        q = ops.unit(q, 1e-6) * count.log().to(q.dtype)
        return q, ops.unit(k, 1e-6)

    def count(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Keys that each query sees [batch or 1, heads or 1, queries or 1, 1]."""
        if not inputs.runs_along(self.pattern):
            visible = inputs.visible(q, k)
            assert visible is not None  # else sums run along
            pairs: Tensor = visible.sum(-1, keepdim=True)
            return pairs
        valid = torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device)
        valid = valid if inputs.valid is None else inputs.valid[:, -k.shape[2] :]
        valid = valid[:, None, :, None]
        causal = inputs.looks_back(self.pattern)
        return valid.cumsum(2)[:, :, -q.shape[2] :] if causal else valid.sum(2, keepdim=True)

    @property
    def score_mod(self) -> ScoreMod | None:
        """The logarithm of softplus, after the position encoding's change."""
        inner = self.position_encoding.score_mod
        if self.activation == "exp":
            return inner
        return self._log_softplus if inner is None else self._changed

    def _changed(
        self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        inner = self.position_encoding.score_mod
        score = score if inner is None else inner(score, b, h, q_idx, kv_idx)
        return self._log_softplus(score, b, h, q_idx, kv_idx)

    @placeless
    def _log_softplus(
        self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        # Far below 0 it is the score itself, where softplus or its inverse leaves the range.
        low = -10.0 if score.dtype == torch.float16 else -40.0
        return torch.where(score < low, score, softplus(score.clamp(min=low)).log())


@mechanism("softplus-reweighted-attention", aliases=("lssar",))
class SoftplusReweighted(Softplus):
    """Softplus attention, sharpened to the keys above a row's average."""

    claims = (
        Claim(
            "length-scaled, re-weighted scores go on working beyond the trained length",
            task="extrapolation", split="64 tokens", steps=600,
        ),
    )  # fmt: skip

    supports = Supports()

    power: int = option("p", default=15, at_least=1)
    spared: int = option("rows that see at most so many keys are not cut", default=3, at_least=1)

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """Both stages."""
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = super().normalize(exact, inputs)
        count = (scores != -torch.inf).sum(-1, keepdim=True)
        above = (count * weights - (count > self.spared).to(weights)).relu()
        # Relative to the largest, since small numbers to the 15th would vanish.
        peak = above.amax(-1, keepdim=True).detach()
        flat = peak == 0
        sharp = (above / peak.masked_fill(flat, 1.0)) ** self.power
        sharp = sharp / sharp.sum(-1, keepdim=True).masked_fill(flat, 1.0)
        return torch.where(flat, weights, sharp).to(scores.dtype)
