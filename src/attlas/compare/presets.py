"""Presets: how much `attlas compare` measures, and of what, unless the user says otherwise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preset:
    """How much is measured.

    Attributes:
        lengths: tokens of context.
        depths: where needles stand, as shares of the context.
        needles: texts per length and depth (single), and per length (several keys).
        contexts: texts per length whose continuation is read.
        continuation: tokens that are predicted after each of them.
        repeats: runs of each method by itself for speed and memory.
        decode: tokens decoded in each of these.
        methods: compared when the user names none; empty for all that say that they are comparable in it.
    """

    name: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    needles: int
    contexts: int
    continuation: int
    repeats: int
    decode: int
    methods: tuple[str, ...]

    @property
    def room(self) -> int:
        """Tokens that follow the context at most: a question and its answer, or a continuation."""
        return max(96, self.continuation, self.decode)


_BUDGETS = ("streaming-llm", "snapkv", "expected-attention")
PRESETS = {
    "quick": Preset(
        name="quick",
        lengths=(1024, 2048),
        depths=(0.1, 0.5, 0.9),
        needles=2,
        contexts=2,
        continuation=128,
        repeats=3,
        decode=16,
        methods=(
            "full",
            *(f"{name}(keep={keep})" for name in _BUDGETS for keep in (0.5, 0.25)),
            "key-norm-eviction(keep=0.5)",
        ),
    ),
    "full": Preset(
        name="full",
        lengths=(1024, 2048, 4096, 8192),
        depths=(0.1, 0.3, 0.5, 0.7, 0.9),
        needles=5,
        contexts=4,
        continuation=256,
        repeats=5,
        decode=32,
        methods=(
            "full",
            *(
                f"{name}(keep={keep})"
                for name in (*_BUDGETS, "key-norm-eviction")
                for keep in (0.75, 0.5, 0.25)
            ),
            "streaming-llm(keep=0.25, rerotate=True)",
            "snapkv(keep=0.25, window=64, kernel=5, pooling='avg')",
        ),
    ),
    "cache": Preset(
        name="cache",
        lengths=(1024, 4096, 8192),
        depths=(0.1, 0.3, 0.5, 0.7, 0.9),
        needles=2,
        contexts=2,
        continuation=128,
        repeats=2,
        decode=16,
        methods=(),
    ),
    # One length: budgets in tokens are another share of another one.
    "prefill": Preset(
        name="prefill",
        lengths=(4096,),
        depths=(0.1, 0.5, 0.9),
        needles=2,
        contexts=2,
        continuation=64,
        repeats=2,
        decode=8,
        methods=(),
    ),
}
