"""The table of a training, for the terminal and as Markdown."""

from __future__ import annotations

from html import escape
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attlas.train.summary import Column, Summary, ceiling, shown

ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def parts_of(summary: Summary) -> list[tuple[str, list[Column]]]:
    """The table in parts that fit 80 columns: what is learnt, and what it costs."""
    learnt = [c for c in summary.columns if c.key.startswith("score ") or c.key == "loss"]
    cost = [c for c in summary.columns if c not in learnt]
    seeds = summary.plan.seeds
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    return [
        (f"What is learnt ({summary.plan.task}, {summary.plan.steps} steps; {spread})", learnt),
        ("What it costs", cost),
    ]


def terminal(summary: Summary) -> RenderableType:
    """The table in its parts; spreads stand under the numbers."""
    parts: list[RenderableType] = []
    for caption, columns in parts_of(summary):
        table = Table(title=caption, title_justify="left", title_style="bold", box=None,
                      pad_edge=False, header_style="bold")  # fmt: skip
        table.add_column("mechanism", overflow="fold")
        for column in columns:
            title = (column.title + ARROWS[column.better]).replace(" ", "\n", 1)
            table.add_column(title, justify="right")
        for name in summary.table:
            cells = (_cell(summary, name, column, "\n") for column in columns)
            table.add_row(Text(name), *map(Text, cells))
        parts += [Text(), table]
    notes = [f"  {c.title}: {c.meaning}" for c in summary.columns]
    return Group(*parts, Text("\n" + "\n".join(notes), "dim"), Text(origin(summary), "dim"))


def write(summary: Summary, path: Path) -> None:
    """table.md: the same parts, their meaning, and where they come from."""
    lines = [f"# {escape(summary.plan.task)}: mechanisms trained side by side", ""]
    for caption, columns in parts_of(summary):
        heads = [c.title + ARROWS[c.better] for c in columns]
        lines += [f"**{escape(caption)}**", "", _row(["mechanism", *heads])]
        lines += [_row(["---"] + ["--:"] * len(heads))]
        for name in summary.table:
            lines.append(_row([f"`{name}`", *(_cell(summary, name, c, " ") for c in columns)]))
        lines.append("")
    lines += [f"- {c.title}: {c.meaning}" for c in summary.columns]
    lines += ["", escape(origin(summary)), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def origin(summary: Summary) -> str:
    """What ran where, in one line."""
    plan = summary.plan
    return (
        f"task {plan.task}; {plan.layers} layers of width {plan.dim} with {plan.heads} heads; "
        f"{plan.steps} steps of {plan.batch} rows, AdamW at {plan.rate:g}; {plan.dtype} on "
        f"{plan.device} ({'; '.join(summary.stamps('machine'))}); {'; '.join(summary.stamps('versions'))}"
    )


def winners(summary: Summary) -> str:
    """The ceiling, as a sentence."""
    said = ceiling(summary.task)
    return said[0].upper() + said[1:] + "."


def _cell(summary: Summary, name: str, column: Column, between: str) -> str:
    found = summary.table[name][column.key]
    if isinstance(found, str):
        return found
    mean, beside = shown(column, found)
    return f"{mean}{between}{beside}" if beside else mean


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
