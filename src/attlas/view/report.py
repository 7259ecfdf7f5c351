"""report.html of a comparison: table, curves, needles and every cell, in the shell of all pages."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from attlas.compare.methods import FULL
from attlas.compare.summary import Summary, meaning, shown
from attlas.tasks.compare.base import Metric
from attlas.tasks.record import Measure
from attlas.view.curves import INK, Point, costs, curves, qualities
from attlas.view.heat import heat_maps
from attlas.view.shell import head, legend, page, rows_of
from attlas.view.table import MISSING, origin

#: What is shown of every cell.
_NAMES = ("method", "task", "metric", "length", "depth", "value", "low", "high", "n", "seconds",
          "status")  # fmt: skip


def write(summary: Summary, path: Path) -> None:
    """Write the page."""
    figures = _figures(summary)
    body = [_table(summary), _charts(summary) if figures else "", heat_maps(summary), _how(summary),
            rows_of(summary.lines, _NAMES, "Every measured number")]  # fmt: skip
    title = f"Attention methods on {summary.grid.model}"
    path.write_text(page(title, origin(summary), body, figures), encoding="utf-8")


def _table(summary: Summary) -> str:
    heads = [head("method", "ascending")]
    heads += [
        head(f"{c.title} {'↑' if c.better == 'higher' else '↓'}",
              "descending" if c.better == "higher" else "ascending", meaning(c, summary))
        for c in summary.columns
    ]  # fmt: skip
    rows = []
    for method in summary.table:
        mark = ' class="full"' if method == FULL else ""
        name = escape(method)
        cells = "".join(_cell(summary, method, column) for column in summary.columns)
        rows.append(
            f'<tr><th scope="row" data-value="{name}"{mark}><code>{name}</code></th>{cells}</tr>'
        )
    meanings = "".join(
        f"<dt>{escape(c.title)}</dt><dd>{escape(meaning(c, summary))}</dd>" for c in summary.columns
    )
    return f"""
<h2 id="table">The table</h2>
<p class="lead">↑ higher is better, ↓ lower is better; a click on a head sorts. {escape(_where(summary))}
Under a number stands its 95 % interval, or the least that this machine could need; the best beside full
attention is bold.</p>
<div class="scroll" role="region" aria-label="Results by method" tabindex="0">
<table class="data"><thead><tr>{"".join(heads)}</tr></thead><tbody>{"".join(rows)}</tbody></table>
</div>
<dl>{meanings}</dl>"""


def _how(summary: Summary) -> str:
    """How it was measured, as each task tells."""
    notes = [task.how for task in summary.grid.chosen.values() if task.how]
    notes.append(
        "Intervals are 95 %: Wilson’s for shares of right answers, ±1.96 standard errors for means. Few "
        "samples give wide intervals; the preset ‘full’ narrows them."
    )
    items = "".join(f"<li>{escape(note)}</li>\n" for note in notes)
    return f'\n<h2 id="how">How it was measured</h2>\n<ul>\n{items}</ul>'


def _where(summary: Summary) -> str:
    """Which columns are pooled, and where the others stand."""
    pooled = ", ".join(m.title for m in summary.columns if m.pool is not None)
    if not pooled:
        return f"All numbers are at {summary.longest} tokens."
    rest = f"Everything else is at {summary.longest} tokens."
    return f"Pooled over all lengths and depths: {pooled}. {rest}"


def _cell(summary: Summary, method: str, column: Metric) -> str:
    found = summary.table[method].get(column.key, MISSING)
    if isinstance(found, str):
        return f'<td class="none" data-value="">{escape(found)}</td>'
    number, beside = shown(column, found)
    best = ' class="best"' if _is_best(summary, method, column, found) else ""
    small = f"<small>{escape(beside)}</small>" if beside else ""
    return f'<td data-value="{found.value!r}"><span{best}>{number}</span>{small}</td>'


def _is_best(summary: Summary, method: str, column: Metric, measure: Measure) -> bool:
    others = [
        found.value
        for name, row in summary.table.items()
        if name != FULL and isinstance(found := row.get(column.key), Measure)
    ]
    if method == FULL or len(others) < 2 or min(others) == max(others):
        return False
    return measure.value == (max(others) if column.better == "higher" else min(others))


def _charts(summary: Summary) -> str:
    options = "".join(
        f'<option value="{c.key}">{escape(c.title)} ({c.better} is better)</option>'
        for c in qualities(summary)
    )
    families = legend(
        (curve.family, curve.colour)
        for curve in curves(summary, costs(summary)[0], qualities(summary)[0])
    )
    places = "".join(
        f'<div class="chart" id="chart-{c.key}" role="img" aria-label="quality against '
        f'{escape(c.title)}; the numbers are in the table"></div>'
        for c in costs(summary)
    )
    return f"""
<h2 id="charts">Quality against memory and speed</h2>
<p class="lead">Left is cheaper. A line joins the budgets of one method; the star is full attention,
which keeps everything. A good method stays at the star’s height while it moves left.</p>
<div class="choices"><label for="quality">Quality:</label>
<select id="quality">{options}</select></div>
<div class="charts">{places}</div>
{families}"""


def _figures(summary: Summary) -> list[dict[str, Any]]:
    return [
        {
            "quality": quality.key,
            "place": f"chart-{cost.key}",
            # Plotly reads a little HTML in its texts, so they are escaped as such.
            "across": escape(f"{cost.title} (left is better)"),
            "zero": True,
            "upwards": escape(f"{quality.title} ({quality.better} is better)"),
            "curves": [
                {
                    "family": escape(curve.family),
                    "colour": curve.colour,
                    "full": curve.colour == INK,
                    "x": [p.x for p in curve.points],
                    "y": [p.y.value for p in curve.points],
                    "up": [(p.y.high or 0.0) - p.y.value for p in curve.points],
                    "down": [p.y.value - (p.y.low or 0.0) for p in curve.points],
                    "budget": [escape(p.budget) for p in curve.points],
                    "hover": [_hover(p, cost, quality) for p in curve.points],
                }
                for curve in curves(summary, cost, quality)
            ],
        }
        for quality in qualities(summary)
        for cost in costs(summary)
    ]


def _hover(point: Point, cost: Metric, quality: Metric) -> str:
    return (
        f"<b>{escape(point.method)}</b><br>{quality.title}: {point.y.value:.{quality.digits}f}"
        f"<br>{cost.title}: {point.x:.{cost.digits}f}"
    )
