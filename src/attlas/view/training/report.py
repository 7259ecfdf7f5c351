"""report.html of a training: table, learning curves and every run, in the shell of all pages."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from attlas.train.summary import Column, Summary, shown
from attlas.view.curves import INK
from attlas.view.shell import head, legend, page, rows_of
from attlas.view.training.curves import Curve, colours, costs, losses, points, scores
from attlas.view.training.table import ARROWS, origin, winners

_METHOD_NOTE = """
<h2 id="how">How it was trained</h2>
<ul>
<li>One model for each mechanism and seed, alike but for attention: with the same seed all have the
same weights outside attention at the start.</li>
<li>A step’s rows follow from the seed and the step’s number: every mechanism reads the same rows in the
same order. Tests are the same rows for all mechanisms and seeds.</li>
<li>AdamW; the learning rate rises in a line over the first tenth of the steps and falls to 0 as a cosine.
It is the same for all: a mechanism that wants another one is not at its best here.</li>
<li>Operations are matrix products of a forward pass over one row, counted by PyTorch with attention
written out; what a kernel need not compute of a causal mask is counted too.</li>
<li>The cache is weighed after decoding a row token by token; a cache of fixed size weighs less for each
token the longer the row.</li>
<li>The ± of the table is one standard deviation over seeds; few seeds say little about it.</li>
</ul>
"""
_RUN = ("mechanism", "seed", "status", "steps_done", "diverged_at", "scores", "seconds", "step_ms",
        "parameters", "operations", "cache_bytes_per_token", "cache_growth", "processes",
        "reason")  # fmt: skip


def write(summary: Summary, path: Path) -> None:
    """Write the page."""
    figures = _figures(summary)
    body = [_table(summary), _charts(summary) if figures else "", _METHOD_NOTE,
            rows_of(summary.lines, _RUN, "Every run")]  # fmt: skip
    title = f"Attention mechanisms trained on {summary.plan.task}"
    path.write_text(page(title, origin(summary), body, figures), encoding="utf-8")


def _table(summary: Summary) -> str:
    heads = head("mechanism", "ascending") + "".join(
        head(c.title + ARROWS[c.better], "descending" if c.better == "higher" else "ascending",
             c.meaning)
        for c in summary.columns
    )  # fmt: skip
    rows = []
    for name in summary.table:
        cells = "".join(_cell(summary, name, column) for column in summary.columns)
        text = escape(name)
        rows.append(f'<tr><th scope="row" data-value="{text}"><code>{text}</code></th>{cells}</tr>')
    meanings = "".join(
        f"<dt>{escape(c.title)}</dt><dd>{escape(c.meaning)}</dd>" for c in summary.columns
    )
    return f"""
<h2 id="table">The table</h2>
<p class="lead">Means over {summary.plan.seeds} seeds, standard deviations under them; ↑ higher is better,
↓ lower is better; a click on a head sorts. {escape(winners(summary))}</p>
<div class="scroll" role="region" aria-label="Results by mechanism" tabindex="0">
<table class="data"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>
</div>
<dl>{meanings}</dl>"""


def _cell(summary: Summary, name: str, column: Column) -> str:
    found = summary.table[name][column.key]
    if isinstance(found, str):
        return f'<td class="none" data-value="">{escape(found)}</td>'
    mean, beside = shown(column, found)
    small = f"<small>{beside}</small>" if beside else ""
    return f'<td data-value="{found.mean!r}">{mean}{small}</td>'


def _charts(summary: Summary) -> str:
    places = "".join(
        f'<div class="chart" id="{figure["place"]}" role="img" aria-label="{figure["upwards"]} by '
        f'{figure["across"]}; the numbers are in the table"></div>'
        for figure in _figures(summary)
    )
    return f"""
<h2 id="charts">Learning curves, and what a score costs</h2>
<p class="lead">Lines are means over seeds; bands reach from the lowest seed to the highest. The
star is plain softmax.</p>
<div class="charts">{places}</div>
{legend(colours(summary).items())}"""


def _figures(summary: Summary) -> list[dict[str, Any]]:
    judged = summary.task.judged
    upwards = f"{judged.title} ({judged.better} is better)"
    positive = all(p.mean > 0 for curve in losses(summary) for p in curve.y)
    found = [
        _lines("chart-score", upwards, scores(summary), False),
        _lines("chart-loss", "training loss", losses(summary), positive),
    ]
    found += [_against(summary, cost, upwards) for cost in costs(summary)]
    return [figure for figure in found if figure["curves"]]


def _lines(place: str, upwards: str, curves: list[Curve], log: bool) -> dict[str, Any]:
    # Plotly reads a little HTML in its texts, so they are escaped as such.
    return {
        "place": place, "across": "step", "upwards": escape(upwards), "zero": False, "log": log,
        "curves": [
            {
                "family": escape(curve.mechanism), "colour": curve.colour, "line": True,
                "x": curve.x, "y": [p.mean for p in curve.y],
                "up": [p.high - p.mean for p in curve.y], "down": [p.mean - p.low for p in curve.y],
                "hover": [f"<b>{escape(curve.mechanism)}</b><br>step {x:g}: {p.mean:.4g}"
                          for x, p in zip(curve.x, curve.y, strict=True)],
            }
            for curve in curves
        ],
    }  # fmt: skip


def _against(summary: Summary, cost: Column, upwards: str) -> dict[str, Any]:
    return {
        "place": f"chart-{cost.key}", "across": escape(f"{cost.title} (left is better)"),
        "upwards": escape(upwards), "zero": True, "log": False,
        "curves": [
            {
                "family": escape(name), "colour": colour, "full": colour == INK, "line": False,
                "x": [x], "y": [y.mean], "up": [y.high - y.mean], "down": [y.mean - y.low],
                "budget": [""],
                "hover": [f"<b>{escape(name)}</b><br>{y.mean:.{summary.task.judged.digits}f}"
                          f"<br>{cost.title}: {x:.{cost.digits}f}"],
            }
            for name, colour, x, y in points(summary, cost)
        ],
    }  # fmt: skip
