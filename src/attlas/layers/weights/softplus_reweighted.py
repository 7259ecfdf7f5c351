"""Softplus attention (LSSA) and its sharpened form (LSSAR): positive weights, divided by their sum.

    s = log d · log n_i · (q_i/|q_i|)·(k_j/|k_j|),   a = softplus(s) / Σ_visible softplus(s)
    LSSAR: weights = r / Σ r,   r = relu(n_i a − o_i)^p,   p = 15,   o_i = 1 where n_i > 3, else 0

n_i counts the keys that query i sees. LSSA is softmax attention with log softplus(s) for its scores.
Where all weights of a row are equal, none is above average: LSSAR keeps them.

Cost: LSSA that of plain attention, memory linear; LSSAR a pass more over the n² weights, in memory.
Reduces to softmax attention with exp for softplus and q·k/√d for s.
Source: "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models", in
others' retellings of its revised text; o_i for the first three rows in a third party's program alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from attlas import masks, ops
from attlas.attention import Attention, Prepared
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs, MaskLike
from attlas.kinds.claim import Claim
from attlas.masks import Mask
from attlas.positions import ScoreMod

if TYPE_CHECKING:
    from attlas.hf.caches import Cache


@mechanism(
    "length-scaled-softplus-attention", paper="softplus-reweighted-attention", aliases=("lssa",),
    reduces_to=Reduction("softmax", {"activation": "exp", "scaled": False}, lambda layer, plain: (
        plain.load_state_dict(layer.state_dict())
    )),
)  # fmt: skip
class Softplus(Attention):
    """Attention whose weights are softplus of length-scaled cosines, normalised.

    Args:
        activation: what makes scores positive: "softplus" or "exp".
        scaled: cosines times log d · log n; else q·k/√d.
    """

    def __init__(
        self, dim: int, heads: int = 8, *args: Any,
        activation: Literal["softplus", "exp"] = "softplus", scaled: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        if activation not in ("softplus", "exp"):
            raise ValueError(f"activation must be 'softplus' or 'exp', got {activation!r}")
        super().__init__(dim, heads, *args, **options)
        self.activation, self.scaled = activation, scaled
        if scaled and self.head_dim < 2:
            raise ValueError(f"head_dim must be at least 2 for log d, got {self.head_dim}")
        self.scale = math.log(self.head_dim) if scaled else self.scale

    @property
    def score_mod(self) -> ScoreMod | None:
        """The logarithm of softplus, after the position encoding's change."""
        inner = self.position_encoding.score_mod
        return inner if self.activation == "exp" else self._log_softplus

    def _log_softplus(
        self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor
    ) -> Tensor:
        inner = self.position_encoding.score_mod
        score = score if inner is None else inner(score, b, h, q_idx, kv_idx)
        # Far below 0 it is the score itself, where softplus or its inverse leaves the range.
        low = -10.0 if score.dtype == torch.float16 else -40.0
        return torch.where(score < low, score, softplus(score.clamp(min=low)).log())

    def prepare(
        self, x: Tensor, context: Tensor | None = None, mask: MaskLike | None = None,
        positions: Tensor | None = None, cache: Cache | None = None, **extras: Tensor,
    ) -> Prepared:  # fmt: skip
        """Keys of unit length, and queries of length log n; a cache holds them as projected."""
        q, k, v, pairs, inputs = super().prepare(x, context, mask, positions, cache, **extras)
        if self.scaled:
            count = self._count(q, k, pairs, inputs).clamp(min=1).to(torch.float64)
            q = normalize(q, dim=-1, eps=1e-6) * count.log().to(q.dtype)
            k = normalize(k, dim=-1, eps=1e-6)
        return q, k, v, pairs, inputs

    def _count(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Keys that each query sees [batch or 1, heads or 1, queries or 1, 1]."""
        valid = torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device)
        valid = (valid if inputs.valid is None else inputs.valid[:, -k.shape[2] :])[
            :, None, :, None
        ]
        if inputs.runs_along(self.pattern):
            causal = masks.causal in (self.pattern, mask)
            return valid.cumsum(2)[:, :, -q.shape[2] :] if causal else valid.sum(2, keepdim=True)
        visible = inputs.visible(q, k)
        assert visible is not None  # else sums run along
        count: Tensor = visible.sum(-1, keepdim=True)
        return count


@mechanism("softplus-reweighted-attention", aliases=("lssar",))
class SoftplusReweighted(Softplus):
    """Softplus attention, sharpened to the keys above a row's average.

    Args:
        power: p.
        spared: rows that see at most so many keys are not cut.
    """

    claims = (
        Claim(
            "length-scaled, re-weighted scores go on working beyond the trained length",
            task="extrapolation",
            split="64 tokens",
            steps=600,
        ),
    )

    memory_law = "quadratic"

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, power: int = 15, spared: int = 3, **options: Any
    ) -> None:
        super().__init__(dim, heads, *args, **options)
        self.power, self.spared = at_least_one("power", power), at_least_one("spared", spared)

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """Both stages."""
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = super().normalize(exact)
        count = (scores != -torch.inf).sum(-1, keepdim=True)
        above = (count * weights - (count > self.spared).to(weights)).relu()
        # Relative to the largest, since small numbers to the 15th would vanish.
        peak = above.amax(-1, keepdim=True).detach()
        flat = peak == 0
        sharp = (above / peak.masked_fill(flat, 1.0)) ** self.power
        sharp = sharp / sharp.sum(-1, keepdim=True).masked_fill(flat, 1.0)
        return torch.where(flat, weights, sharp).to(scores.dtype)
