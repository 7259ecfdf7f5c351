"""The needle heat maps: for each method, right answers by depth and length, as plain tables."""

from __future__ import annotations

from html import escape

from attlas.compare.results import Line
from attlas.compare.summary import Summary
from attlas.view.table import MISSING

_KINDS = (
    ("single", "one needle"),
    ("blind", "one needle, the question unforeseen"),
    ("several", "several needles"),
)


def heat_maps(summary: Summary) -> str:
    """A card for each method; empty when no needle was sought."""
    needles: dict[tuple[object, ...], Line] = {
        (line["method"], line["metric"], line["depth"], line["length"]): line
        for line in summary.lines
        if line["task"] == "needle"
    }
    if not needles:
        return ""
    cards = []
    for method in summary.table:
        maps = "".join(_map(summary, needles, method, *kind) for kind in _KINDS)
        cards.append(
            f'<section class="map"><h3><code>{escape(method)}</code></h3>'
            f'<div class="pair">{maps}</div></section>'
        )
    return f"""
<h2 id="needles">Where needles are found</h2>
<p class="lead">Share of right answers. To the right, longer texts; downwards, needles further from the
text’s beginning and nearer to the question. Several needles: which of them is asked.</p>
<div class="maps">{"".join(cards)}</div>"""


def _map(
    summary: Summary, needles: dict[tuple[object, ...], Line], method: str, kind: str, title: str
) -> str:
    lengths = summary.grid.lengths
    heads = "".join(f'<th scope="col">{length}</th>' for length in lengths)
    rows = ""
    for depth in summary.grid.preset.depths:
        cells = "".join(_share(needles.get((method, kind, depth, length))) for length in lengths)
        rows += f'<tr><th scope="row">{100 * depth:g} %</th>{cells}</tr>'
    return (
        f'<table class="heat"><caption>{title}</caption>'
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
