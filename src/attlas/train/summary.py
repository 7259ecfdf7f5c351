"""From runs to a table: one row a mechanism, every number as mean and spread over the seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from attlas.journal import Line
from attlas.tasks.train import Task
from attlas.train.plan import Plan
from attlas.train.results import Results


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table.

    Attributes:
        key: what it is called in a row.
        title: its head, with the unit.
        better: "higher", "lower", or "" where neither is.
        meaning: one sentence.
        scale: from the stored unit to the shown one.
        digits: after the point.
    """

    key: str
    title: str
    better: str
    meaning: str
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over seeds, the smallest and the largest of them; `sd` is None with one seed."""

    mean: float
    sd: float | None
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Summary:
    """All that the views show.

    Attributes:
        plan: what was trained.
        task: on what.
        columns: of the table, the splits' scores first.
        table: by mechanism and column; a word where there is no number.
        lines: every run.
    """

    plan: Plan
    task: Task
    columns: tuple[Column, ...]
    table: dict[str, dict[str, Spread | str]]
    lines: tuple[Line, ...]

    def of(self, mechanism: str) -> list[Line]:
        """A mechanism's runs."""
        return [line for line in self.lines if line["mechanism"] == mechanism]

    def stamps(self, field: str) -> list[str]:
        """The different machines or versions that stand in the lines, in words."""
        return list(dict.fromkeys(_words(line[field]) for line in self.lines))


def summarize(results: Results, plan: Plan, task: Task) -> Summary:
    """The table of the plan's runs."""
    latest = results.latest
    lines = tuple(latest[run] for run in plan.runs() if run in latest)
    columns = tuple(_columns(plan, task))
    table = {
        m.label: {
            c.key: _cell(c, [li for li in lines if li["mechanism"] == m.label]) for c in columns
        }
        for m in plan.mechanisms
    }
    shown = tuple(c for c in columns if any(row[c.key] != NONE for row in table.values()))
    return Summary(plan, task, shown, table, lines)


#: Where a model has no such number.
NONE = "–"


def ceiling(task: Task) -> str:
    """What the best possible score is, in words."""
    if task.best is None:
        return task.yardstick
    return f"the best possible is {task.judged.scale * task.best:g} ({task.yardstick})"


def spread(values: Iterable[float]) -> Spread:
    """Mean and standard deviation."""
    given = list(values)
    mean = math.fsum(given) / len(given)
    if len(given) == 1:
        return Spread(mean, None, mean, mean)
    variance = math.fsum((v - mean) ** 2 for v in given) / (len(given) - 1)
    return Spread(mean, math.sqrt(variance), min(given), max(given))


def shown(column: Column, found: Spread) -> tuple[str, str]:
    """Mean and spread as text, in the column's unit."""
    mean = f"{column.scale * found.mean:.{column.digits}f}"
    return mean, "" if found.sd is None else f"± {column.scale * found.sd:.{column.digits}f}"


def _columns(plan: Plan, task: Task) -> Iterable[Column]:
    judged = task.judged
    for split in task.splits:
        title = judged.title if len(task.splits) == 1 else f"{judged.title} {split}"
        said = f"on {plan.tested} rows of the split {split!r}; {ceiling(task)}"
        yield Column(f"score {split}", title, judged.better, said, judged.scale, judged.digits)
    yield Column("loss", "loss", "lower", "mean over the last tenth of the steps", 1.0, 3)
    yield Column("parameters", "k parameters", "lower", "trained numbers, in thousands", 1e-3)
    operations = "matrix products of a forward pass over one row, counted with all pairs"
    yield Column("operations", "MFLOP", "lower", operations, 1e-6, 2)
    yield Column("seconds", "seconds", "lower", "in all training steps, tests not included")
    yield Column("step_ms", "ms/step", "lower", "median over the run, so without a slow beginning")
    cache = "bytes a decode cache holds for each token, weighed after decoding a row"
    yield Column("cache_bytes_per_token", "cache B/token", "lower", cache, 1.0, 0)
    growth = "bytes that each further token adds to it; 0 for a state of constant size"
    yield Column("cache_growth", "growth B/token", "lower", growth, 1.0, 0)


def _cell(column: Column, lines: list[Line]) -> Spread | str:
    """One number over the seeds; the state of the first run that has none."""
    if not lines:
        return "not run"
    failed = next((line for line in lines if line["status"] != "ok"), None)
    if failed is not None:
        at = failed.get("diverged_at")
        return f"diverged at step {at}" if at else str(failed["status"])
    values = [_value(column.key, line) for line in lines]
    numbers = [v for v in values if v is not None]
    return spread(numbers) if len(numbers) == len(values) else NONE


def _value(key: str, line: Line) -> float | None:
    if key.startswith("score "):
        return float(line["scores"][key.removeprefix("score ")])
    if key == "loss":
        tail = line["curve"][-max(1, len(line["curve"]) // 10) :]
        return math.fsum(loss for _, loss in tail) / len(tail)
    found = line.get(key)  # which results of an earlier version may lack
    return None if found is None else float(found)


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return str(value)
