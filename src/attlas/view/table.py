"""The table of a comparison, for the terminal and as Markdown."""

from __future__ import annotations

from html import escape
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attlas.compare.methods import FULL
from attlas.compare.summary import Summary, meaning, shown
from attlas.tasks.compare.base import SECTIONS, Metric

MISSING = "–"


def parts_of(summary: Summary) -> list[tuple[str, list[Metric]]]:
    """The table in parts that fit 80 columns, one a section; each with its caption."""
    lengths = ", ".join(map(str, summary.grid.lengths))
    found = []
    for section in SECTIONS:
        caption = section.caption.format(lengths=lengths, longest=summary.longest)
        found.append((caption, [m for m in summary.columns if m.section is section]))
    return [(caption, metrics) for caption, metrics in found if metrics]


def terminal(summary: Summary) -> RenderableType:
    """The table in its parts; intervals stand under the numbers."""
    parts: list[RenderableType] = []
    for caption, columns in parts_of(summary):
        table = Table(title=caption, title_justify="left", title_style="bold", box=None,
                      pad_edge=False, header_style="bold")  # fmt: skip
        table.add_column("method", overflow="fold")
        for column in columns:
            # In two lines, so that all stands in 80 columns.
            table.add_column("\n".join(_head(column).split(" ", 1)), justify="right", no_wrap=True)
        for method in summary.table:
            name, bracket, options = method.partition("(")
            label = Text(name, "bold" if method == FULL else "")
            if bracket:
                label += Text("\n" + options.removesuffix(")"), "dim")
            table.add_row(label, *(_terminal_cell(summary, method, c) for c in columns))
        parts += [Text(), table]
    notes = [f"  {c.title}: {meaning(c, summary)}" for c in summary.columns]
    parts += [Text("\n↑ higher is better, ↓ lower is better", "dim"), Text("\n".join(notes), "dim")]
    parts += [Text(origin(summary), "dim")]
    return Group(*parts)


def write(summary: Summary, path: Path) -> None:
    """table.md: the same parts, their meaning, and where they come from."""
    lines = [f"# {escape(summary.grid.model)}: attention methods compared", ""]
    for caption, columns in parts_of(summary):
        heads = [_head(c) for c in columns]
        lines += [
            f"**{caption}**",
            "",
            _row(["method", *heads]),
            _row(["---"] + ["--:"] * len(heads)),
        ]
        for method in summary.table:
            cells = [_markdown_cell(summary, method, c) for c in columns]
            lines.append(_row([f"`{method}`", *cells]))
        lines.append("")
    lines += ["↑ higher is better, ↓ lower is better.", ""]
    lines += [f"- {c.title}: {meaning(c, summary)}" for c in summary.columns]
    lines += ["", escape(origin(summary)), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def origin(summary: Summary) -> str:
    """What ran where, in one line."""
    grid = summary.grid
    return (
        f"model {grid.model}, {grid.dtype} on {grid.device} ({'; '.join(summary.stamps('machine'))}), "
        f"preset {grid.preset.name}, seed {grid.seed}; {'; '.join(summary.stamps('versions'))}"
    )


def _head(column: Metric) -> str:
    return f"{column.title} {'↑' if column.better == 'higher' else '↓'}"


def _terminal_cell(summary: Summary, method: str, column: Metric) -> Text:
    found = summary.table[method].get(column.key, MISSING)
    if isinstance(found, str):
        return Text(found, "dim" if found == MISSING else "red")
    number, beside = shown(column, found)
    return Text(number) + Text(f"\n{beside}" if beside else "", "dim")


def _markdown_cell(summary: Summary, method: str, column: Metric) -> str:
    found = summary.table[method].get(column.key, MISSING)
    if isinstance(found, str):
        return found
    number, beside = shown(column, found)
    return f"{number} ({beside})" if beside else number


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
