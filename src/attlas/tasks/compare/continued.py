"""The reading of a context and of the true text that follows it, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.compare.methods import Method
from attlas.compare.presets import Preset
from attlas.compare.shared import Reading, forward, stepwise
from attlas.tasks.compare.base import Bench, Context
from attlas.tasks.continuation import Continuation, continuation


@dataclass(frozen=True, slots=True)
class Continued:
    """Logits behind each fed token: the full cache's and the method's, and the tokens that follow."""

    full: Float[Tensor, "tokens vocabulary"]
    method: Float[Tensor, "tokens vocabulary"]
    targets: Int[Tensor, " tokens"]


class ContinuedText(Context):
    """A passage of the plays; its continuation is fed as it stands, whatever a method would say."""

    name, title = "continuation", "continuation"

    def weight(self, length: int) -> float:
        """A continuation behind a shared prefill."""
        return 200 + 0.15 * length

    def text(
        self, tokenizer: Any, preset: Preset, length: int, depth: float | None, seed: str
    ) -> Continuation:
        """A context and what follows it."""
        return continuation(tokenizer, length, preset.continuation, seed)

    def read(
        self, bench: Bench, text: Continuation, methods: Sequence[Method]
    ) -> tuple[Reading, Tensor, Tensor, Tensor]:
        """(the prefill, what is fed, full attention's logits behind it, the tokens that follow)."""
        reading = Reading.of(bench.model, text.context, methods)
        fed = torch.tensor([text.fed], device=bench.model.device)
        targets = torch.tensor(text.targets, device=bench.model.device)
        full = forward(bench.model, fed, reading.prompt.fork(None), logits=0).logits[0]
        return reading, fed, full, targets

    def observe(
        self,
        bench: Bench,
        read: tuple[Reading, Tensor, Tensor, Tensor],
        method: Method,
        hold: Callable[[Any], int],
    ) -> Continued:
        """The method's logits behind each fed token."""
        reading, fed, full, targets = read
        with reading.attached(method):
            cache, _ = reading.fork(method)
            hold(cache)
            # One by one, as they would be generated, where that matters.
            pieces = fed.split(1, dim=1) if stepwise(reading.parts[method.label]) else (fed,)
            found = [forward(bench.model, piece, cache, logits=0).logits[0] for piece in pieces]
        return Continued(full, torch.cat(found), targets)


CONTINUED = ContinuedText()
