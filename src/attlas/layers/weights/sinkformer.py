"""Sinkformer: weights whose rows and columns both sum to one.

    K = exp(S / ε),  S = q kᵀ / √d;   repeat: rows to 1/n, then columns to 1/n (log-domain Sinkhorn)
    out = n · plan · v

Half steps are counted: after an odd number the rows sum to 1 exactly; rows and columns both approach
1 as they go on. Padded tokens take no part on either side.

Cost: plain attention and `half_steps` passes over the n² scores; memory quadratic in length. Every
weight depends on all tokens, so there is no causal form.
Reduces to softmax attention at one half step and ε = 1.
Source: "Sinkformers: Transformers with Doubly Stochastic Attention".
"""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports


@mechanism("sinkformer", reduces_to=Reduction(
    "softmax", {"half_steps": 1}, lambda layer, plain: plain.load_state_dict(layer.state_dict())
))  # fmt: skip
class Sinkformer(Attention):
    """Attention with doubly stochastic weights."""

    supports = Supports(causal=False, cross=False, memory="quadratic", queries="all")

    half_steps: int = option(
        "normalisations, rows first and last when odd (the authors' `max_iter`)", default=3,
        at_least=1,
    )  # fmt: skip
    epsilon: float = option("temperature ε", default=1.0, above=0)

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """n times the transport plan; a token whose column is hidden everywhere is padding."""
        log_plan = scores / self.epsilon
        padded = (scores == -torch.inf).all(-2)
        log_plan = log_plan.masked_fill(padded[..., None], -torch.inf)
        for step in range(self.half_steps):
            log_plan = log_plan - _logsumexp(log_plan, dim=-2 if step % 2 else -1)
        return log_plan.exp()


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """log Σ exp along `dim`, with 0 (and no gradient) where all entries are −∞."""
    dead = x.amax(dim, keepdim=True) == -torch.inf
    return x.masked_fill(dead, 0.0).logsumexp(dim, keepdim=True).masked_fill(dead, 0.0)
