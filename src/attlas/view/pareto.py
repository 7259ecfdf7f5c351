"""pareto.png: what is kept against what it costs, one curve for each family of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from attlas.compare.summary import Summary
from attlas.tasks.compare.base import Metric
from attlas.view.curves import INK, costs, curves, qualities


def write(summary: Summary, path: Path) -> None:
    """Draw two qualities against bytes held, bytes read and time; nothing where one side is missing."""
    across = [m for m in costs(summary) if m.drawn == "picture"] or costs(summary)
    # Two that say different things: what is found, and what is kept of running text.
    up = [m for m in qualities(summary) if m.drawn == "picture"][:2]
    if not across or not up:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(
            figsize=(5 * len(across), 0.8 + 3.4 * len(up)), layout="constrained", dpi=150
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(up), len(across), squeeze=False)
        for row, quality in zip(axes, up, strict=True):
            for axis, cost in zip(row, across, strict=True):
                _draw(axis, summary, cost, quality)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"{summary.grid.model}: what is kept, against what it costs")
        figure.savefig(path)


def _draw(axis: matplotlib.axes.Axes, summary: Summary, cost: Metric, quality: Metric) -> None:
    for curve in curves(summary, cost, quality):
        x = [point.x for point in curve.points]
        y = [point.y.value for point in curve.points]
        spread = [
            [p.y.value - (p.y.low or 0.0) for p in curve.points],
            [(p.y.high or 0.0) - p.y.value for p in curve.points],
        ]
        marker = "*" if curve.colour == INK else "o"
        axis.errorbar(x, y, yerr=spread, color=curve.colour, marker=marker, capsize=2, lw=1.2,
                      elinewidth=0.6, label=curve.family)  # fmt: skip
        for point in curve.points:
            axis.annotate(point.budget, (point.x, point.y.value), (5, 4), fontsize=7,
                          textcoords="offset points", color=curve.colour)  # fmt: skip
    better = "upwards" if quality.better == "higher" else "downwards"
    axis.set_xlabel(f"{cost.title} (left is better)")
    axis.set_ylabel(f"{quality.title} ({better} is better)")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.2)
