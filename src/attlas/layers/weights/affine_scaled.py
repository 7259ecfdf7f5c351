"""Affine-scaled attention: softmax weights, scaled and shifted by what the query's token says.

    weights_i = α_i softmax_i + β_i over the n visible keys,   β_i = (ᾱ − α_i) / n
    α = clip(0.1 W x + 0.5, 0, 1), one a head and token;   ᾱ ← ρ ᾱ + (1 − ρ) mean(α) while training

Rows sum to ᾱ. The shift is (ᾱ − α_i) times the mean of the visible values: a running mean where the
mask is causal or absent, with or without padding, else a second fused call with all scores 0.

Cost: that of plain attention and a running mean; memory linear.
Reduces to softmax attention at α = ᾱ = 1.
Source: "Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention". Its parameter
counts give one α a head. Read so here: n counts visible keys (the paper says the keys' length, which
would let later tokens change earlier outputs), ᾱ is kept for each head, and no gradient flows into it.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.network import moving
from attlas.options import option


def _open_gates(layer: AffineScaled, plain: Attention) -> None:
    """α = ᾱ = 1, whatever the token."""
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    layer.gate_proj.weight.zero_()
    layer.gate_proj.bias.fill_(5.0)
    layer.mean_alpha.fill_(1.0)
    theirs = {name: layer.state_dict()[name] for name in plain.state_dict()}
    plain.load_state_dict(theirs)


@mechanism("affine-scaled-attention", aliases=("affine-scaled",), reduces_to=Reduction(
    "softmax", {"bias": True}, _open_gates
))  # fmt: skip
class AffineScaled(Attention):
    """Attention whose rows are scaled and shifted as a whole."""

    claims = (
        Claim(
            "scaled and shifted weights train to no higher a loss", task="shakespeare-bytes",
            better="lower", margin=0.0, steps=500, batch=16,
        ),
    )  # fmt: skip

    activation: Literal["clip", "sigmoid"] = option(
        "from W x to α: clip, linear between −5 and 5, or sigmoid", default="clip"
    )
    momentum: float = option(
        "ρ, the share of ᾱ that a training step keeps", default=0.9, at_least=0, at_most=1
    )

    def setup(self) -> None:
        """A projection to a logit of α for each head, and ᾱ."""
        super().setup()
        self.gate_proj = nn.Linear(self.dim, self.heads, bias=self.bias)
        self.mean_alpha: Tensor
        self.register_buffer("mean_alpha", torch.zeros(self.heads))

    def alpha(self, x: Tensor) -> Tensor:
        """α [batch, heads, queries, 1]."""
        logits: Tensor = rearrange(self.gate_proj(x), "b t h -> b h t 1")
        if self.activation == "sigmoid":
            return logits.sigmoid()
        return (0.1 * logits + 0.5).clamp(0.0, 1.0)

    def shift(self, alpha: Tensor) -> Tensor:
        """nβ, which all that a query sees share."""
        return self.mean_alpha.to(alpha.dtype)[:, None, None] - alpha

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """α softmax + β, hidden keys at 0."""
        weights, alpha = super().normalize(scores, inputs), self.alpha(inputs.x)
        visible = scores != -torch.inf
        count = visible.sum(-1, keepdim=True).clamp(min=1)
        return alpha * weights + visible * self.shift(alpha) / count

    @moving
    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Plain attention in one fused call, scaled, and a share of the visible values' mean."""
        alpha = self.alpha(inputs.x)
        if self.training:
            self._follow(alpha.detach(), inputs)
        out = self.fused(q, k, v, inputs)
        mean = ops.repeated(self._mean(q, k, v, inputs), out.shape[1])
        return alpha * out + self.shift(alpha) * mean

    def _mean(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Mean of the values that each query sees, of one key head for its group if it is the same."""
        if not inputs.runs_along(self.pattern):
            return ops.attend(torch.zeros_like(q), torch.zeros_like(k), v, mask=inputs.pairs)
        dtype = torch.promote_types(v.dtype, torch.float32)
        count = torch.ones(1, 1, k.shape[2], 1, dtype=dtype, device=v.device)
        if inputs.valid is not None:
            valid = inputs.valid[:, None, -k.shape[2] :, None]
            v, count = v * valid, count * valid
        # A lone query sees them all.
        if inputs.looks_back(self.pattern) and q.shape[2] > 1:
            mean, _ = ops.running_mean(v, count.cumsum(2).clamp(min=1))
            return mean[:, :, -q.shape[2] :]
        sums = v.sum(2, keepdim=True, dtype=dtype)
        return (sums / count.sum(2, keepdim=True).clamp(min=1)).to(v)

    def _follow(self, alpha: Tensor, inputs: Inputs) -> None:
        """Move ᾱ towards the mean of this batch's valid tokens."""
        valid = None if inputs.valid is None or inputs.context is not None else inputs.valid_now
        share = (
            torch.ones_like(alpha[:, :1]) if valid is None else valid[:, None, :, None].to(alpha)
        )
        mean = (alpha * share).sum((0, 2, 3)) / share.sum().clamp(min=1)
        self.mean_alpha.lerp_(mean.to(self.mean_alpha), 1 - self.momentum)
