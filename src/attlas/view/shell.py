"""The shell of every page: one file that opens without a network, in light and dark.

All text that comes from users or models is escaped; JSON inside a script cannot end it; and the
page's own policy forbids every fetch.

Figures are drawn by plotly.js's basic bundle, which stands beside the page's own files (MIT; its first
lines are its licence). A figure is drawn in the element `place`; where the page has a choice
`#quality`, only figures of the chosen `quality` are. It has the axes' titles `across` and `upwards`,
`zero` (both axes begin there) and `log` for how they run, and `curves`: `family`, `colour`, `full`
(drawn as a star), `x`, `y`, `up` and `down` (spread above and below), `budget` (a text beside each
point), `hover`, and `line` (no marks at the points, the spread as a band).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any


def page(title: str, lead: str, body: Iterable[str], figures: Sequence[Any]) -> str:
    """A page; title and lead are plain text, the body is HTML already."""
    parts = files("attlas.view").joinpath("page")
    filled = {
        "title": escape(title),
        "lead": escape(lead),
        "css": parts.joinpath("page.css").read_text("utf-8"),
        "body": "\n".join(body),
        "figures": _in_script(figures),
        "plotly": parts.joinpath("plotly-basic.min.js").read_text("utf-8") if figures else "",
        "js": "\n".join(parts.joinpath(name).read_text("utf-8") for name in ("sort.js", "page.js")),
    }
    # Each place is filled once, in order, so that a brace in a user's text is never a place.
    text, html = parts.joinpath("page.html").read_text("utf-8"), ""
    for name in ("title", "css", "title", "lead", "body", "figures", "plotly", "js"):
        before, _, text = text.partition("{" + name + "}")
        html += before + filled[name]
    return html + text


def head(title: str, first: str, hint: str = "", words: bool = False) -> str:
    """The head of a column, of words or of numbers, that sorts; `first` is the first click's order."""
    note = (' class="words"' if words else "") + (f' title="{escape(hint)}"' if hint else "")
    return (
        f'<th scope="col" data-first="{first}"{note}>'
        f'<button type="button">{escape(title)}</button></th>'
    )


def legend(families: Iterable[tuple[str, str]]) -> str:
    """Names and colours of what the figures draw."""
    items = "".join(
        f'<li><i style="background:{colour}"></i><code>{escape(name)}</code></li>'
        for name, colour in dict.fromkeys(families)
    )
    return f'<ul class="legend">{items}</ul>'


def rows_of(lines: Iterable[dict[str, Any]], names: Sequence[str], caption: str) -> str:
    """A folded table of all lines, for those who want to look closer."""
    lines, rows = list(lines), []
    words = {name for name in names if any(isinstance(line.get(name), str) for line in lines)}
    for line in lines:
        cells = []
        for name in names:
            value = line.get(name)
            text = (
                "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
            )
            kind = ' class="words"' if name in words else ""
            cells.append(f'<td{kind} data-value="{escape(text)}">{escape(text)}</td>')
        hint = f' title="{escape(str(line["reason"]))}"' if line.get("reason") else ""
        rows.append(f"<tr{hint}>{''.join(cells)}</tr>")
    heads = "".join(head(name, "ascending", words=name in words) for name in names)
    return f"""
<details><summary>{escape(caption)} ({len(rows)})</summary>
<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">
<table class="data"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>
</div></details>"""


def _in_script(data: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    packed = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return packed.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
