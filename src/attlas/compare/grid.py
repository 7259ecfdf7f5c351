"""The plan: which cells there are, and which of them share their work.

A *cell* is one number: (method, task, length, depth, metric). A *unit* is the cells that come out
of the same contexts: all methods and, where they read the same text, several tasks share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from attlas.compare.methods import Method
from attlas.compare.presets import PRESETS, Preset
from attlas.errors import UnknownName, UserError
from attlas.tasks.compare.base import CompareTask, Context, Metric, find, known

__all__ = [
    "PRESETS", "Cell", "Grid", "Preset", "Unit", "fitting_lengths", "parse_lengths", "parse_tasks",
]  # fmt: skip


class Cell(NamedTuple):
    """One number of the grid; its name in the results file."""

    method: str
    task: str
    length: int
    depth: float | None
    metric: str


class Unit(NamedTuple):
    """Cells that are measured together: what is run, at which length and depth."""

    context: Context
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

    @property
    def chosen(self) -> dict[str, CompareTask]:
        """The tasks by name."""
        return {name: find(name) for name in self.tasks}

    @property
    def metrics(self) -> list[tuple[str, Metric]]:
        """All metrics, each with its task's name, in the order of the tasks."""
        return [(name, metric) for name, task in self.chosen.items() for metric in task.metrics]

    def units(self) -> list[Unit]:
        """What is run, in order: quality first, short contexts first."""
        contexts = dict.fromkeys(m.context for _, m in self.metrics if m.context is not None)
        return [
            Unit(context, length, depth)
            for length in self.lengths
            for context in contexts
            for depth in context.depths(self.preset)
        ]

    def cells(self, unit: Unit, method: str) -> list[Cell]:
        """The cells that a unit measures for one method."""
        thinned = {m.label for m in self.methods if m.thins}
        return [
            Cell(method, task, unit.length, depth, metric.key)
            for depth in unit.context.asked(self.preset, unit.depth)
            for task, metric in self.metrics
            if metric.context is unit.context and (method in thinned or not metric.thinned)
        ]

    def rounds(self, unit: Unit) -> int:
        """Texts of a unit: as many as the task wants that wants most."""
        tasks = [task for task in self.chosen.values() if unit.context in task.contexts]
        return max(task.rounds(self.preset) for task in tasks)

    def all_cells(self) -> list[Cell]:
        """Every cell of the plan, in the order of the run."""
        return [c for u in self.units() for m in self.methods for c in self.cells(u, m.label)]


def parse_tasks(texts: Sequence[str]) -> tuple[str, ...]:
    """The tasks named, in the order in which they are run; all of them when none is.

    Raises:
        UnknownName: with the nearest task.
        UserError: two of them would write numbers of one name.
    """
    tasks = known()
    named = [piece.lower().replace("_", "-") for piece in _pieces(texts)]
    for name in named:
        if name not in tasks:
            raise UnknownName("task", name, tasks)
    chosen = tuple(task for task in tasks if task in named or not named)
    holder: dict[str, str] = {}
    for name in chosen:
        for metric in tasks[name].metrics:
            if holder.setdefault(metric.key, name) != name:
                raise UserError(
                    f"tasks {holder[metric.key]} and {name} both call a number {metric.key!r}; name one "
                    "of them with --tasks"
                )
    return chosen


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
