"""A study's picture: a dot each seed with the mean, or curves where rows have a place on an axis."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import cycle
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib

from attlas.kinds.expect import Row, by_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours that colour-blind readers can tell apart, after Okabe and Ito.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw(rows: Sequence[Row], title: str, axis_label: str) -> Figure:
    """One panel for what has no place, in each unit, and one for the curves of each unit.

    Args:
        rows: of all seeds.
        title: above the panels.
        axis_label: of the curves' horizontal axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[bool, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.at is not None, row.unit), []).append(row)
    lines = [2.2 if curves else 0.35 * len({r.label for r in found}) + 0.6
             for (curves, _), found in panels.items()]  # fmt: skip
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.5, sum(lines) + 1.2), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=lines)[:, 0]
        for axis, ((curves, unit), found) in zip(axes, panels.items(), strict=True):
            (_curves if curves else _dots)(axis, unit, found)
            if curves:
                axis.set_xlabel(axis_label).set_parse_math(False)
        title = "\n".join(fill(line, 90) for line in title.splitlines())
        figure.suptitle(title, fontsize=10).set_parse_math(False)  # a label may hold a dollar sign
    return figure


def _dots(axis: Axes, unit: str, rows: list[Row]) -> None:
    """A line each label: seeds as dots, their mean as a bar across."""
    groups = by_label(rows)
    for place, (colour, found) in enumerate(zip(cycle(COLOURS), groups.values(), strict=False)):
        values = [row.value for row in found]
        axis.plot(values, [place] * len(values), "o", color=colour, ms=4, alpha=0.6, clip_on=False)
        axis.plot([statistics.mean(values)], [place], "|", color=colour, ms=16, mew=2, clip_on=False)
    axis.set_yticks(range(len(groups)), list(groups))
    for text in axis.get_yticklabels():
        text.set_parse_math(False)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    values = [row.value for row in rows]
    means = [abs(statistics.mean(row.value for row in found)) for found in groups.values()]
    if min(values) > 0 and max(means) > 1000 * min(means):
        axis.set_xscale("log")
    elif min(values) >= 0:
        axis.set_xlim(left=0)
    betters = {row.better for row in rows}
    note = f"{betters.pop()} is better" if len(betters) == 1 else ""
    axis.set_xlabel(f"{unit} ({note})" if unit and note else unit or note).set_parse_math(False)
    axis.grid(alpha=0.2, axis="x")


def _curves(axis: Axes, unit: str, rows: list[Row]) -> None:
    """A curve each name: the mean over seeds, and their range as a band."""
    names = dict.fromkeys(row.name for row in rows)
    for colour, name in zip(cycle(COLOURS), names, strict=False):
        places: dict[float, list[float]] = {}
        for row in rows:
            if row.name == name and row.at is not None:
                places.setdefault(row.at, []).append(row.value)
        x = sorted(places)
        axis.plot(x, [statistics.mean(places[at]) for at in x], "o-", color=colour, ms=3, lw=1.4,
                  label=name, clip_on=False)  # fmt: skip
        axis.fill_between(x, [min(places[at]) for at in x], [max(places[at]) for at in x],
                          color=colour, alpha=0.15, lw=0)  # fmt: skip
    axis.set_ylabel(unit).set_parse_math(False)
    if min(row.value for row in rows) >= 0:
        axis.set_ylim(bottom=0)
    for text in axis.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    axis.grid(alpha=0.2)
