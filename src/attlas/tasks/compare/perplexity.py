"""Perplexity of a continuation after a compressed context.

    perplexity = exp( −(1/n) Σ_t log q(x_t | compressed context, x_<t) )

The number of equally likely tokens that the model hesitates between; lower is better. Every counted
token is predicted through the compressed cache: the first token of the continuation, which the
uncompressed prefill already predicts, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attlas.catalog.registry import mechanism
from attlas.compare.presets import Preset
from attlas.tasks.compare.base import KEPT, CompareTask, Context, Metric, Sample
from attlas.tasks.compare.continued import CONTINUED, Continued
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


@mechanism("perplexity", paper="")
class Perplexity(CompareTask):
    """Perplexity of the true continuation."""

    metrics = (
        Metric("perplexity", "perplexity", KEPT, "lower",
               "of the true continuation: how many tokens the model hesitates between",
               CONTINUED, perplexity, digits=1, drawn="picture"),
    )  # fmt: skip
    how = (
        "Perplexity is of the true continuation of a text, every token predicted through the compressed "
        "cache."
    )

    def rounds(self, preset: Preset) -> int:
        """Texts whose continuation is read."""
        return preset.contexts

    def samples(self, context: Context, seen: Continued) -> Iterator[Sample]:
        """One a token."""
        for nats in surprise(seen.method, seen.targets).tolist():
            yield "perplexity", None, nats
