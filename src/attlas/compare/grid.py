"""The plan: which cells there are, and which of them share their work.

A *cell* is one number: (method, task, length, depth, metric). A *unit* is the cells that come out
of the same contexts: all methods and, where they read the same text, several tasks share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from attlas.compare.methods import Method
from attlas.errors import UnknownName, UserError

TASKS = ("needle", "fidelity", "perplexity", "speed", "memory")


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
        methods: compared when the user names none.
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


#: Ways to save on a cache, each at budgets that make it comparable with the others in bytes.
FAMILY = (
    "full",
    *(
        f"{name}(keep={keep})"
        for name in (
            "window", "snapkv", "expected-attention", "observed-attention", "tova", "pyramid-kv",
            "ada-kv", "q-filters",
        )
        for keep in (0.5, 0.25, 0.125)
    ),
    *(f"snapkv(keep={keep}, window=16, kernel=7, pooling='max')" for keep in (0.25, 0.125)),
    *(f"balancekv(keep={keep})" for keep in (0.5, 0.25)),
    "key-norm-eviction(keep=0.5)",
    *(f"quantized-cache(bits={bits})" for bits in (8, 4, 3, 2)),
    "zipcache",
    "qaq-quality-adaptive-quantization",
    "akvq-vl",
    *(f"eigen-attention(keep={keep})" for keep in (0.75, 0.5)),
    *(f"{name}(keep={keep})" for name in (
        "quest-page-selection", "loki-low-rank-keys", "lrqk-low-rank-attention",
        "recycled-attention", "delta-layer-aware-attention",
    ) for keep in (0.25, 0.125)),
    *(f"loki-low-rank-keys(keep={keep}, rank=0.5)" for keep in (0.25, 0.125)),
    "adaptive-long-context-heads",
    "snapkv(keep=0.5)+quantized-cache(bits=4)",
    "snapkv(keep=0.25)+quantized-cache(bits=4)",
    "quantized-cache(bits=4)+quest-page-selection(keep=0.125)",
)  # fmt: skip

_BUDGETS = ("window", "snapkv", "expected-attention")
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
            "window(keep=0.25, rerotate=True)",
            "snapkv(keep=0.25, kernel=7)",
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
        methods=FAMILY,
    ),
}


class Cell(NamedTuple):
    """One number of the grid; its name in the results file."""

    method: str
    task: str
    length: int
    depth: float | None
    metric: str


class Unit(NamedTuple):
    """Cells that are measured together: what is run, at which length and depth."""

    kind: str
    length: int
    depth: float | None


@dataclass(frozen=True, slots=True)
class Grid:
    """All that decides which numbers come out, and so what a results folder must agree on."""

    model: str
    methods: tuple[Method, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    preset: Preset
    device: str
    dtype: str
    seed: int

    def units(self) -> list[Unit]:
        """What is run, in order: quality first, short contexts first."""
        found = []
        for length in self.lengths:
            if "needle" in self.tasks:
                found += [Unit("single", length, depth) for depth in self.preset.depths]
                found += [Unit("several", length, None)]
            if {"fidelity", "perplexity"} & set(self.tasks):
                found += [Unit("continuation", length, None)]
            if {"speed", "memory"} & set(self.tasks):
                found += [Unit("alone", length, None)]
        return found

    def cells(self, unit: Unit, method: str) -> list[Cell]:
        """The cells that a unit measures for one method."""
        if unit.kind == "single":
            place = (unit.length, unit.depth)
            return [
                Cell(method, "needle", *place, metric) for metric in ("single", "digits", "blind")
            ]
        if unit.kind == "several":
            return [Cell(method, "needle", unit.length, d, "several") for d in self.preset.depths]
        by_kind: dict[str, dict[str, tuple[str, ...]]] = {
            "continuation": {"fidelity": ("kl", "top1"), "perplexity": ("perplexity",)},
            "alone": {
                "speed": ("prefill_ms", "decode_ms"),
                "memory": ("cache_bytes", "read_bytes", "peak_bytes"),
            },
        }
        metrics = by_kind[unit.kind]
        return [
            Cell(method, task, unit.length, None, metric)
            for task in self.tasks
            for metric in metrics.get(task, ())
        ]

    def all_cells(self) -> list[Cell]:
        """Every cell of the plan, in the order of the run."""
        return [c for u in self.units() for m in self.methods for c in self.cells(u, m.label)]


def parse_tasks(texts: Sequence[str]) -> tuple[str, ...]:
    """The tasks named, in the order in which they are run; all of them when none is.

    Raises:
        UnknownName: with the nearest task.
    """
    named = _pieces(texts)
    for name in named:
        if name not in TASKS:
            raise UnknownName("task", name, TASKS)
    return tuple(task for task in TASKS if task in named or not named)


def parse_lengths(texts: Sequence[str]) -> tuple[int, ...]:
    """The lengths named, ascending; empty when none is.

    Raises:
        UserError: something that is no positive whole number.
    """
    lengths = set()
    for piece in _pieces(texts):
        if not piece.isdecimal() or int(piece) < 1:
            raise UserError(f"lengths takes whole numbers of tokens such as 1024, got {piece!r}")
        lengths.add(int(piece))
    return tuple(sorted(lengths))


def fitting_lengths(
    asked: tuple[int, ...], preset: Preset, model: str, positions: int | None
) -> tuple[int, ...]:
    """The lengths asked for, or the preset's, cut to what the model's positions leave room for.

    Raises:
        UserError: a length that was asked for does not fit.
    """
    longest = None if positions is None else positions - preset.room
    if longest is not None and longest < 1:
        raise UserError(
            f"model {model!r} has {positions} positions, too few for {preset.room} more"
        )
    for length in asked:
        if longest is not None and length > longest:
            raise UserError(
                f"length {length} is beyond {model!r}: of its {positions} positions {preset.room} "
                f"are kept for what follows the context; ask for at most {longest}"
            )
    if asked or longest is None:
        return asked or preset.lengths
    return tuple(sorted({min(length, longest) for length in preset.lengths}))


def _pieces(texts: Sequence[str]) -> list[str]:
    return [piece for text in texts for piece in text.replace(",", " ").split()]
