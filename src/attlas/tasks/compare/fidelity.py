"""Fidelity: how far a method's next-token distributions stray from full attention's.

    kl     mean over tokens of Σ_v p(v) (log p(v) − log q(v)),  p full attention, q the method (nats)
    top-1  share of tokens at which both hold the same token most likely

Both read the same continuation, teacher-forced: the true tokens are fed, whatever the method would
have said. The context before it is compressed, the continuation is not. 0 nats and 100 % are
perfect; full attention scores so by definition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from attlas.catalog.registry import mechanism
from attlas.compare.presets import Preset
from attlas.tasks.compare.base import KEPT, CompareTask, Context, Metric, Sample
from attlas.tasks.compare.continued import CONTINUED, Continued
from attlas.tasks.record import Measure, hits, mean


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


@mechanism("fidelity", paper="")
class Fidelity(CompareTask):
    """Divergence from full attention's next-token distributions, and agreement on the likeliest."""

    metrics = (
        Metric("kl", "KL nats", KEPT, "lower",
               "divergence of the next-token distributions from full attention's, per token",
               CONTINUED, kl, digits=3, drawn="picture"),
        Metric("top1", "top-1 %", KEPT, "higher",
               "tokens at which the most likely next one is the same as full attention's",
               CONTINUED, hits, scale=100.0, drawn="picture"),
    )  # fmt: skip
    how = (
        "KL and top-1 agreement read the true continuation of a text, token by token, through the "
        "compressed cache."
    )

    def rounds(self, preset: Preset) -> int:
        """Texts whose continuation is read."""
        return preset.contexts

    def samples(self, context: Context, seen: Continued) -> Iterator[Sample]:
        """One of each a token."""
        for nats in divergence(seen.full, seen.method).tolist():
            yield "kl", None, nats
        for same in agreement(seen.full, seen.method):
            yield "top1", None, same
