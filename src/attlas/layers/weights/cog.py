"""Cog attention: weights carry the sign of their logits, so that a head can subtract too.

    p = q kᵀ / √d,   weights = sign(p) · softmax(|p|) over the visible keys;   sign(0) = 0

Absolute weights sum to 1 in every row, the weights themselves to less. Positive and negative logits
are two softmaxes that the fused call takes as two heads; their sums merge by their normalisers.

Cost: twice the scores and sums of plain attention; memory linear.
Reduces to softmax attention where all logits are positive.
Source: "More Expressive Attention with Negative Weights" (rotary positions: `position="rope"`). The
paper's models keep softmax in their first and last layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attlas import masks, ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.masks import Mask
from attlas.positions.base import placeless


@mechanism("cog-attention", aliases=("cog",))
class Cog(Attention):
    """Attention with negative weights, which takes no options of its own."""

    claims = (
        Claim(
            "negative weights make heads more expressive", task="shakespeare-bytes", better="lower",
            steps=500, batch=16,
        ),
    )  # fmt: skip

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """sign(p) · softmax(|p|)."""
        hidden = scores == -torch.inf
        signs = scores.masked_fill(hidden, 0.0).sign()
        return signs * ops.softmax(scores.abs().masked_fill(hidden, -torch.inf))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Positive and negative logits as heads 2h and 2h + 1 of one fused call, then merged."""
        if q.shape[2] == 1:  # for a lone query the weights are little to hold
            return self.aggregate(self.weigh(q, k, inputs), v, inputs)
        mask, plain = inputs.pairs, self.position_encoding.score_mod is None
        change = self._by_sign if plain else self._signed
        if isinstance(mask, Mask) and mask.heads:
            mask = masks.by_groups(mask, 2)
        elif isinstance(mask, Tensor) and mask.shape[1] > 1:
            mask = mask.repeat_interleave(2, dim=1)
        out, lse = ops.attend(
            q.repeat_interleave(2, dim=1), k, v, mask=mask, scale=self.scale,
            score_mod=inputs.by_positions(change, k.shape[2]),
            dropout=self.dropout if self.training else 0.0, return_lse=True,
        )  # fmt: skip
        positive, negative = (out[:, 0::2], lse[:, 0::2]), (-out[:, 1::2], lse[:, 1::2])
        return ops.merge([positive, negative])[0]

    def _signed(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """|p| where p has the sub-head's sign; a half of exp(0) each, which cancel, where it has none."""
        inner = self.position_encoding.score_mod
        p = score if inner is None else inner(score, b, h // 2, q_idx, kv_idx)
        return self._by_sign(p, b, h, q_idx, kv_idx)

    @placeless
    def _by_sign(self, p: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        p = p * (1 - 2 * (h % 2))
        return p.masked_fill(p < 0, -torch.inf).masked_fill(p == 0, -math.log(2))
