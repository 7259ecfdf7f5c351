"""A unit of the plan: its contexts, read and observed. Each method's cells come as they are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from attlas.attach.session import cache_bytes
from attlas.compare.grid import Cell, Grid, Unit
from attlas.compare.methods import Method
from attlas.errors import UserError
from attlas.tasks.compare.base import Bench
from attlas.tasks.record import Measure
from attlas.tasks.roof import clock


class OutOfMemory(Exception):
    """The machine had too little memory for what was tried."""


@dataclass(slots=True)
class Outcome:
    """What a unit found for one method.

    Attributes:
        measures: by cell; None where memory ran out.
        seconds: of this method's own work, and its share of what all read together.
        kv_bytes: held by the cache after the context, on average over the contexts.
        reason: why a measure is missing.
    """

    method: Method
    measures: dict[Cell, Measure | None]
    seconds: float
    kv_bytes: int
    reason: str = ""


@dataclass(slots=True)
class Tally:
    """What has been gathered for a method so far; samples by task, metric and depth."""

    seconds: float = 0.0
    held: list[int] = field(default_factory=list)
    samples: dict[tuple[str, str, float | None], list[Any]] = field(default_factory=dict)
    reason: str = ""

    def hold(self, cache: Any) -> int:
        """Note the bytes that a cache holds after the context."""
        self.held.append(cache_bytes(cache))
        return self.held[-1]

    @property
    def kv_bytes(self) -> int:
        """Bytes held after the context, on average over the contexts."""
        return round(sum(self.held) / len(self.held)) if self.held else 0


def run_unit(
    grid: Grid, bench: Bench, unit: Unit, methods: Sequence[Method], tick: Callable[[], None]
) -> Iterator[Outcome]:
    """Run a unit for these methods; each is handed over as soon as it is finished.

    Args:
        grid: the plan.
        bench: what it runs on.
        unit: what is read.
        methods: those of which a cell is missing.
        tick: told of each method's every round.
    """
    tallies = {method.label: Tally() for method in methods}
    rounds = grid.rounds(unit)
    for number in range(rounds):
        seed = f"{grid.seed}/{unit.context.name}/{unit.length}/{unit.depth}/{number}"
        going = [method for method in methods if not tallies[method.label].reason]
        for method in _round(grid, bench, unit, going, tallies, seed):
            tick()
            if number == rounds - 1:
                yield _outcome(grid, bench, unit, method, tallies[method.label])
        for method in methods:
            if method not in going:
                tick()
    for method in methods:
        if tallies[method.label].reason:
            yield _outcome(grid, bench, unit, method, tallies[method.label])


def _round(
    grid: Grid,
    bench: Bench,
    unit: Unit,
    methods: Sequence[Method],
    tallies: dict[str, Tally],
    seed: str,
) -> Iterator[Method]:
    """One text, read once for all, and observed with each method; those that were."""
    context, device = unit.context, bench.model.device
    if not methods:
        return
    tasks = [(name, t) for name, t in grid.chosen.items() if context in t.contexts]
    text = context.text(bench.tokenizer, grid.preset, unit.length, unit.depth, seed)
    start = clock(device)
    try:
        with memory_watched():
            read = context.read(bench, text, methods)
    except OutOfMemory as error:
        for method in methods:
            tallies[method.label].reason = str(error)
        return
    for method in methods:  # each is charged its share of the time
        tallies[method.label].seconds += (clock(device) - start) / len(methods)
    for method in methods:
        with _charged(device, tallies[method.label]) as tally:
            seen = context.observe(bench, read, method, tally.hold)
            for name, task in tasks:
                for metric, depth, value in task.samples(context, seen):
                    tally.samples.setdefault((name, metric, depth), []).append(value)
        if not tallies[method.label].reason:
            yield method


def _outcome(grid: Grid, bench: Bench, unit: Unit, method: Method, tally: Tally) -> Outcome:
    cells = grid.cells(unit, method.label)
    measures: dict[Cell, Measure | None] = dict.fromkeys(cells)
    if not tally.reason:
        measures = {cell: measured(grid, bench, cell, tally) for cell in cells}
    return Outcome(method, measures, tally.seconds, tally.kv_bytes, tally.reason)


def measured(grid: Grid, bench: Bench, cell: Cell, tally: Tally) -> Measure:
    """A cell's number from what was gathered.

    Raises:
        UserError: the task gave no sample of it.
    """
    task = grid.chosen[cell.task]
    metric = next(m for m in task.metrics if m.key == cell.metric)
    samples = tally.samples.get((cell.task, cell.metric, cell.depth))
    if metric.measure is None or not samples:
        raise UserError(
            f"task {cell.task}: its samples hold none of {cell.metric!r} at depth {cell.depth}, or the "
            "metric has no `measure`"
        )
    found = metric.measure(samples)
    beside = {
        key: some for (name, key, at), some in tally.samples.items()
        if (name, at) == (cell.task, cell.depth)
    }  # fmt: skip
    floor = task.floor(metric, bench, cell.length, tally.kv_bytes, beside)
    return found if floor is None else replace(found, floor=floor)


@contextmanager
def _charged(device: torch.device, tally: Tally) -> Iterator[Tally]:
    """Time goes to the tally; memory that runs out becomes its reason."""
    start = clock(device)
    try:
        with memory_watched():
            yield tally
    except OutOfMemory as error:
        tally.reason = str(error)
    tally.seconds += clock(device) - start


@contextmanager
def memory_watched() -> Iterator[None]:
    """Turn the ways in which memory can run out into one exception, and free what can be freed.

    Raises:
        OutOfMemory: memory ran out inside the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        cpu = "can't allocate memory" in said or "not enough memory" in said
        if not (cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))):
            raise
        reason = said.strip().splitlines()[0] if said.strip() else "not enough memory"
    else:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemory(reason)
