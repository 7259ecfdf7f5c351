"""From cells to a table: one row a method, one column a question that a reader has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attlas.compare.grid import Grid
from attlas.compare.methods import FULL, Method, written
from attlas.compare.results import Line
from attlas.tasks.compare.base import SECTIONS, Metric
from attlas.tasks.record import Measure

_BUDGET_OPTIONS = ("keep", "tokens", "bytes", "bits", "pages")


@dataclass(frozen=True, slots=True)
class Summary:
    """All that the views show.

    Attributes:
        grid: the plan.
        columns: the metrics that were measured, in the order of the table.
        table: by method's label and metric's key; a word where there is no number, and why.
        lines: every cell.
    """

    grid: Grid
    columns: tuple[Metric, ...]
    table: dict[str, dict[str, Measure | str]]
    lines: tuple[Line, ...]

    @property
    def longest(self) -> int:
        """The length at which all is shown that is not pooled."""
        return max(self.grid.lengths)

    def stamps(self, field: str) -> list[str]:
        """The different machines or versions that stand in the lines, in words."""
        return list(dict.fromkeys(_words(line[field]) for line in self.lines))


def summarize(lines: Sequence[Line], grid: Grid) -> Summary:
    """The table of all finished cells."""
    chosen = grid.chosen
    table: dict[str, dict[str, Measure | str]] = {method.label: {} for method in grid.methods}
    for method, row in table.items():
        for name, metric in grid.metrics:
            found = [
                line for line in lines
                if (line["method"], line["task"], line["metric"]) == (method, name, metric.key)
                and (metric.pool is not None or line["length"] == max(grid.lengths))
            ]  # fmt: skip
            if found:
                row[metric.key] = _pooled(metric, found)
        for task in chosen.values():
            row.update(task.derived(lines, method))
    # Within a section in the order of the tasks, whose first sections are in order already.
    metrics = sorted((m for _, m in grid.metrics), key=lambda m: SECTIONS.index(m.section))
    shown = tuple(m for m in metrics if any(m.key in row for row in table.values()))
    return Summary(grid, shown, table, tuple(lines))


def meaning(metric: Metric, summary: Summary) -> str:
    """What a metric says, in words that fit the device."""
    on_cuda = summary.grid.device.startswith("cuda")
    return metric.on_cuda if on_cuda and metric.on_cuda else metric.meaning


def family(method: Method) -> str:
    """A method without its budgets: what a line in a picture connects."""
    return "+".join(
        written(name, [o for o in options if o[0] not in _BUDGET_OPTIONS])
        for name, options in method.named
    ) or FULL  # fmt: skip


def budget(method: Method) -> str:
    """A method's budgets in a few signs; empty where it has none."""
    found = []
    for _, options in method.named:
        given = dict(options)
        name = next((name for name in _BUDGET_OPTIONS if name in given), None)
        if name is not None:
            share = name == "keep" and isinstance(given[name], float)
            found.append(f"{100 * given[name]:g} %" if share else f"{given[name]} {name}")
    return " + ".join(found)


def shown(metric: Metric, measure: Measure) -> tuple[str, str]:
    """A number and its interval as text, in the unit that is shown."""

    def text(value: float) -> str:
        return f"{metric.scale * value:.{metric.digits}f}"

    if measure.floor is not None:
        return text(measure.value), f"floor {text(measure.floor)}"
    if measure.low is None or measure.high is None or not metric.quality:
        return text(measure.value), ""
    return text(measure.value), f"{text(measure.low)}–{text(measure.high)}"


def _pooled(metric: Metric, lines: list[Line]) -> Measure | str:
    """One measure from one or several lines; the status of the first that has no number."""
    failed = next((line["status"] for line in lines if line["status"] != "ok"), None)
    if failed is not None:
        return str(failed)
    if metric.pool is not None:
        return metric.pool(lines)
    line = lines[0]
    return Measure(line["value"], line["n"], line["low"], line["high"], line["floor"], line["sd"])


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return str(value)
