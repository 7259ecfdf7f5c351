"""Heat maps: for each method, shares by depth and length, as plain tables."""

from __future__ import annotations

from html import escape

from attlas.compare.results import Line
from attlas.compare.summary import Summary, meaning
from attlas.tasks.compare.base import CompareTask, Metric
from attlas.view.table import MISSING


def heat_maps(summary: Summary) -> str:
    """For each task that has maps a card for each method; empty where nothing was measured."""
    maps = [_maps(summary, name, task) for name, task in summary.grid.chosen.items()]
    return "".join([*maps, *(_heads(summary, metric) for _, metric in summary.grid.metrics)])


def _heads(summary: Summary, metric: Metric) -> str:
    """For each method a number for each layer and head, where a metric has them."""
    found = [
        line for line in summary.lines
        if line["metric"] == metric.key and line["length"] == summary.longest and "by_head" in line
    ]  # fmt: skip
    if not found:
        return ""
    cards = "".join(
        f'<section class="map"><h3><code>{escape(line["method"])}</code></h3>{_by_head(metric, line)}'
        "</section>"
        for line in found
    )
    return f"""
<h2 id="heads-{escape(metric.key)}">{escape(metric.title)} by layer and head</h2>
<p class="lead">{escape(meaning(metric, summary).capitalize())}, at {summary.longest} tokens.</p>
<div class="maps">{cards}</div>"""


def _by_head(metric: Metric, line: Line) -> str:
    rows = line["by_head"]
    heads = "".join(f'<th scope="col">{head}</th>' for head in range(max(map(len, rows))))
    body = "".join(
        f'<tr><th scope="row">{layer}</th>'
        + "".join(
            f'<td style="--share:{100 * x:.1f}%">{metric.scale * x:.0f}</td>' for x in row
        )
        + "</tr>"
        for layer, row in enumerate(rows)
    )
    return (
        f'<table class="heat"><caption>{escape(metric.title)}</caption>'
        f'<thead><tr><th scope="col">layer</th>{heads}</tr></thead><tbody>{body}</tbody></table>'
    )


def _maps(summary: Summary, name: str, task: CompareTask) -> str:
    measured: dict[tuple[object, ...], Line] = {
        (line["method"], line["metric"], line["depth"], line["length"]): line
        for line in summary.lines
        if line["task"] == name
    }
    if not measured or task.maps is None:
        return ""
    heading, lead = task.maps
    cards = []
    for method in summary.table:
        maps = "".join(_map(summary, measured, method, m) for m in task.metrics if m.map)
        cards.append(
            f'<section class="map"><h3><code>{escape(method)}</code></h3>'
            f'<div class="pair">{maps}</div></section>'
        )
    return f"""
<h2 id="maps-{escape(name)}">{escape(heading)}</h2>
<p class="lead">{escape(lead)}</p>
<div class="maps">{"".join(cards)}</div>"""


def _map(
    summary: Summary, measured: dict[tuple[object, ...], Line], method: str, metric: Metric
) -> str:
    lengths = summary.grid.lengths
    heads = "".join(f'<th scope="col">{length}</th>' for length in lengths)
    rows = ""
    for depth in summary.grid.preset.depths:
        cells = "".join(
            _share(measured.get((method, metric.key, depth, length))) for length in lengths
        )
        rows += f'<tr><th scope="row">{100 * depth:g} %</th>{cells}</tr>'
    return (
        f'<table class="heat"><caption>{escape(metric.map)}</caption>'
        f'<thead><tr><th scope="col">depth</th>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _share(line: Line | None) -> str:
    if line is None:
        return f'<td class="none">{MISSING}</td>'
    if line["status"] != "ok":
        return f'<td class="none">{escape(line["status"])}</td>'
    percent = 100 * line["value"]
    right = round(line["value"] * line["n"])
    return (
        f'<td style="--share:{percent:.1f}%" title="{right} of {line["n"]} right">'
        f"{percent:.0f} %</td>"
    )
