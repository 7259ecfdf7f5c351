"""The loop: every unit that still has cells to measure, one line in the results for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from attlas.compare.grid import Cell, Grid, Unit
from attlas.compare.machine import machine, versions
from attlas.compare.methods import Method
from attlas.compare.results import Line, Results
from attlas.compare.shared import forward
from attlas.compare.units import Outcome, run_unit
from attlas.hf.caches import cache_of
from attlas.tasks.compare.base import Bench
from attlas.tasks.record import Measure
from attlas.tasks.roof import measure_roof

WARM_UP_TOKENS = 128


def run(grid: Grid, model: Any, tokenizer: Any, results: Results, console: Console) -> None:
    """Measure what is missing from the results; what stands there is not touched.

    Raises:
        UserError: the results cannot be written.
    """
    results.check(grid)
    todo = missing(grid, results)
    if not todo:
        console.print(f"all {len(grid.all_cells())} cells are finished in {results.folder}")
        return
    done = len(results.lines)
    if done:
        console.print(f"{done} of {len(grid.all_cells())} cells are finished; going on")
    model.eval()
    stamp = {"versions": versions(), "machine": machine(model.device)}
    with torch.inference_mode(), _progress(console) as progress:
        bar = progress.add_task("warming up", total=sum(_costs(grid, u, m) for u, m in todo))
        _warm_up(model)
        roof = measure_roof(model.device, model.dtype)
        bench = Bench(model, tokenizer, grid.preset, roof)
        for unit, methods in todo:
            progress.update(bar, description=_title(unit))
            tick = _ticker(progress, bar, unit.context.weight(unit.length))
            for outcome in run_unit(grid, bench, unit, methods, tick):
                _write(results, grid, outcome, stamp)


def missing(grid: Grid, results: Results) -> list[tuple[Unit, list[Method]]]:
    """The units, each with the methods of which a cell is missing."""
    finished = results.finished
    found = []
    for unit in grid.units():
        methods = [m for m in grid.methods if not finished >= set(grid.cells(unit, m.label))]
        if methods:
            found.append((unit, methods))
    return found


def _write(results: Results, grid: Grid, outcome: Outcome, stamp: dict[str, Any]) -> None:
    """Append the cells of an outcome that are not finished yet.

    A run killed between two cells of one outcome has finished the first: it is left as it is.
    """
    finished = results.finished
    for cell, measure in outcome.measures.items():
        if cell not in finished:
            results.append(_line(grid, cell, measure, outcome) | stamp)


def _line(grid: Grid, cell: Cell, measure: Measure | None, outcome: Outcome) -> Line:
    status = "out of memory" if measure is None else "ok"
    if measure is not None and not math.isfinite(measure.value):
        status, measure = "not finite", None
    found = measure or Measure(0.0, 0)
    line = {
        "model": grid.model,
        **cell._asdict(),
        "value": found.value if measure else None,
        "low": _finite(found.low),
        "high": _finite(found.high),
        "sd": _finite(found.sd),
        "floor": found.floor,
        "n": found.n,
        "seconds": round(outcome.seconds, 4),
        "kv_bytes": outcome.kv_bytes,
        "status": status,
        "reason": outcome.reason,
        "seed": grid.seed,
        "preset": grid.preset.name,
        "device": grid.device,
        "dtype": grid.dtype,
    }
    return line if found.by_head is None else line | {"by_head": found.by_head}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _warm_up(model: Any) -> None:
    """First calls pay for threads, kernels and allocations that later ones find ready."""
    ids = torch.zeros(1, WARM_UP_TOKENS, dtype=torch.long, device=model.device)
    cache = cache_of(forward(model, ids, None))
    forward(model, ids[:, :1], cache)


def _costs(grid: Grid, unit: Unit, methods: list[Method]) -> float:
    return grid.rounds(unit) * len(methods) * unit.context.weight(unit.length)


def _title(unit: Unit) -> str:
    depth = "" if unit.depth is None else f", depth {unit.depth:g}"
    return f"{unit.context.title}, {unit.length} tokens{depth}"


def _ticker(progress: Progress, bar: Any, cost: float) -> Callable[[], None]:
    return lambda: progress.advance(bar, cost)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,
    )
