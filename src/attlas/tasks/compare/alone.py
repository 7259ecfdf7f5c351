"""The run of a method by itself, so that nothing shared flatters it: times, bytes and the peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attlas.attach.session import bytes_read
from attlas.compare.methods import Method
from attlas.compare.presets import Preset
from attlas.compare.shared import attached, forward
from attlas.hf.caches import cache_of
from attlas.tasks.compare.base import Bench, Context
from attlas.tasks.continuation import Continuation, continuation
from attlas.tasks.peak import Peak
from attlas.tasks.roof import clock


@dataclass(frozen=True, slots=True)
class Alone:
    """What one run took.

    Attributes:
        prefill: seconds.
        decode: seconds of each token.
        held: bytes of the cache after the context.
        read: of these, what one token reads, after the last one.
        peak: bytes, see `attlas.tasks.peak`.
        density: share of the context's pairs that each head read, layer by layer; None: it tells none.
    """

    prefill: float
    decode: list[float]
    held: int
    read: int
    peak: int
    density: tuple[tuple[float, ...], ...] | None = None


class AloneRun(Context):
    """A passage of the plays, read and continued by each method in turn.

    In turn, so that a machine that grows slower favours none.
    """

    name, title = "alone", "speed and memory"

    def weight(self, length: int) -> float:
        """A prefill of its own."""
        return 400 + 1.15 * length

    def text(
        self, tokenizer: Any, preset: Preset, length: int, depth: float | None, seed: str
    ) -> Continuation:
        """A context and the tokens that are decoded after it."""
        return continuation(tokenizer, length, preset.decode, seed)

    def read(self, bench: Bench, text: Continuation, methods: Sequence[Method]) -> Continuation:
        """Nothing is shared but the text."""
        return text

    def observe(
        self, bench: Bench, read: Continuation, method: Method, hold: Callable[[Any], int]
    ) -> Alone:
        """Prefill, then token by token."""
        device = bench.model.device
        ids = torch.tensor([read.context], device=device)
        decode = []
        parts = method.parts()
        with attached(bench.model, parts):
            peak = Peak(device)
            start = clock(device)
            cache = cache_of(forward(bench.model, ids, None))
            prefill = clock(device) - start
            held = hold(cache)
            for token in read.fed:
                start = clock(device)
                forward(bench.model, torch.tensor([[token]], device=device), cache)
                decode.append(clock(device) - start)
            highest = peak.bytes()
            density = density_by_head(parts, bench.model) if method.thins else None
            return Alone(prefill, decode, held, bytes_read(cache), highest, density)


def density_by_head(parts: Sequence[Any], model: Any) -> tuple[tuple[float, ...], ...]:
    """The share of a prompt's pairs that each head read, layer by layer; layers left alone read all."""
    config = model.config.get_text_config(decoder=True)
    told = next(part.density for part in parts if part.preset == "prefill")
    every = [1.0] * config.num_attention_heads
    layers = (told[i].tolist() if i in told else every for i in range(config.num_hidden_layers))
    return tuple(map(tuple, layers))


ALONE = AloneRun()
