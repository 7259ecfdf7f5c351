"""Perplexity of a continuation after a compressed context.

    perplexity = exp( −(1/n) Σ_t log q(x_t | compressed context, x_<t) )

The number of equally likely tokens that the model hesitates between; lower is better. Every counted
token is predicted through the compressed cache: the first token of the continuation, which the
uncompressed prefill already predicts, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attlas.tasks.record import Measure, mean


def surprise(
    logits: Float[Tensor, "tokens vocabulary"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """−log q(target) at each token, in nats."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def perplexity(per_token: Sequence[float]) -> Measure:
    """exp of the mean surprise; the ends of its interval are exp of the mean's."""
    found = mean(per_token)
    if found.low is None or found.high is None:
        return Measure(_exp(found.value), found.n)
    return Measure(_exp(found.value), found.n, _exp(found.low), _exp(found.high))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf  # beyond is beyond double precision
