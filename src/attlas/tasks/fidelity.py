"""Fidelity: how far a method's next-token distributions stray from full attention's.

    kl     mean over tokens of Σ_v p(v) (log p(v) − log q(v)),  p full attention, q the method (nats)
    top-1  share of tokens at which both hold the same token most likely

Both read the same continuation, teacher-forced: the true tokens are fed, whatever the method would
have said. The context before it is compressed, the continuation is not. 0 nats and 100 % are
perfect; full attention scores so by definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from attlas.tasks.record import Measure, mean, share


def divergence(
    full: Float[Tensor, "tokens vocabulary"], method: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """KL(full || method) at each token, in nats, from logits; never below zero."""
    p, q = full.float().log_softmax(-1), method.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0)


def agreement(
    full: Float[Tensor, "tokens vocabulary"], method: Float[Tensor, "tokens vocabulary"]
) -> list[bool]:
    """At each token, whether the most likely next token is the same."""
    same: list[bool] = (full.argmax(-1) == method.argmax(-1)).tolist()
    return same


def kl(per_token: Sequence[float]) -> Measure:
    """The mean divergence with its standard error."""
    found = mean(per_token)
    return found if found.low is None else replace(found, low=max(0.0, found.low))


def top1(same: Sequence[bool]) -> Measure:
    """The share of agreeing tokens with Wilson's interval."""
    return share(sum(same), len(same))
