"""`attlas list` and `attlas show`: the catalogue on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from attlas.catalog.describe import described
from attlas.catalog.famous import famous
from attlas.catalog.papers import Paper, paper, papers
from attlas.catalog.registry import Entry
from attlas.catalog.stages import STAGES, reasons

_ImplementedOption = Annotated[
    bool | None, typer.Option("--implemented/--missing", help="Only what exists, or what does not.")
]


def list_papers(
    group: Annotated[str | None, typer.Option(help="Only this family: heads, cache, …")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind: layer, op, cache, …")] = None,
    stage: Annotated[str | None, typer.Option(help="Only what changes this stage.")] = None,
    implemented: _ImplementedOption = None,
    search: Annotated[str | None, typer.Option(help="Words that slug, title or text hold.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line.")] = False,
) -> None:
    """List the papers and mechanisms of the atlas."""
    rows = papers(group=group, kind=kind, stage=stage, implemented=implemented, search=search)
    if as_json:
        for row in rows:
            print(json.dumps(row.as_json(), ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "slug", "stages", "group", "kind", "title"):
        table.add_column(column, no_wrap=column in ("slug", "stages"), overflow="fold")
    for row in rows:
        table.add_row(
            Text("●", "green") if row.implemented else Text("○", "dim"),
            Text(row.slug), _letters(row), row.group, row.kind, Text(row.title),
        )  # fmt: skip
    console = Console()
    console.print(table)
    built = sum(row.implemented for row in rows)
    console.print(
        f"\n{len(rows)} rows, {built} implemented (●). Stages: "
        + " ".join(f"[bold]{s[0].upper()}[/]{s[1:]}" for s in STAGES)
        + ". `attlas show SLUG` tells more."
    )


def show(name: Annotated[str, typer.Argument(help="A slug or the name of a mechanism.")]) -> None:
    """Tell what a paper changes in attention, and what of it exists here."""
    if (known := famous(name)) is not None:
        said = known.here[0].upper() + known.here[1:] + "."
        Console().print(Panel(Text(said), title=Text(name), subtitle=Text(known.title), padding=1))
        return
    row = paper(name)
    # A row may hold several mechanisms: of one that is named, that one alone is told.
    key = name.strip().lower().replace("_", "-")
    shown = [e for e in row.entries if key in (*e.names, *e.former)] or row.entries
    others = [e.name for e in row.entries if e not in shown]
    stages = shown[0].stages if others else row.stages
    kind = shown[0].kind.name if others else row.kind
    body: list[RenderableType] = [_bar(stages), Text(f"\n{kind} · {row.group}", "dim")]
    if not row.entries:
        body += [_section("To build", row.build), _section("Works when", row.works_when)]
        if not row.sure:
            body.append(Text("\nIts equations are still to be established.", "yellow"))
    for entry in shown:
        body += _existing(entry)
    if others:
        body.append(_section("Of the same row", ", ".join(others)))
    own = not others or shown[0].name == row.slug
    if row.headline and own:
        body.append(_section("The paper's claim", row.headline))
    title, below = shown[0].name if others else row.slug, row.title if own else ""
    Console().print(Panel(Group(*body), title=Text(title), subtitle=Text(below), padding=1))


def _existing(entry: Entry) -> list[RenderableType]:
    law = entry.memory
    parts: list[RenderableType] = [
        Text(f"\n{entry.doc}"),
        Text(f"\nOptions of {entry.name}", "bold"), _options(entry),
        _section(
            "Exists", f"{entry.kind.run.replace('NAME', entry.name)}\n"
            + (f"also called {', '.join(entry.aliases)}\n" if entry.aliases else "") + entry.file
            + (f"\nmemory of a forward pass: {law} in length" if law else ""),
        ),
    ]  # fmt: skip
    supports = getattr(entry.object, "supports", None)
    for title, told in (
        ("torch.compile makes several graphs of it", "graph_breaks"),
        ("torch.export makes a program for one length alone", "one_length"),
    ):
        if reason := getattr(supports, told, ""):
            parts.append(_section(title, reason))
    why = {s: w for s, w in reasons(entry.object).items() if s in entry.stages}
    if why:
        told = "\n".join(f"{stage}: {reason}" for stage, reason in why.items())
        parts.append(_section("Why it changes more than its paper", told))
    if entry.reduces_to is not None:
        options = ", ".join(f"{k}={v!r}" for k, v in entry.reduces_to.options.items())
        parts.append(_section("Reduces to", f"{entry.reduces_to.to} ({options or 'its defaults'})"))
    return parts


def _options(entry: Entry) -> RenderableType:
    """Every option with its type, default and meaning, a line each."""
    found = described(entry.object)
    if not found:
        return Text("  it takes none", "dim")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", overflow="fold", ratio=2)
    table.add_column(overflow="fold", ratio=3)
    for each in found:
        table.add_row(Text(f"  {each.told}"), Text(each.meaning))
    return table


def _bar(stages: Sequence[str]) -> Text:
    """The seven stages, those that the paper changes lit."""
    bar = Text()
    for stage in STAGES:
        lit = stage in stages
        bar.append(f" {stage} ", "bold reverse cyan" if lit else "dim")
        bar.append(" ")
    return bar


def _letters(row: Paper) -> Text:
    letters = Text()
    for stage in STAGES:
        letters.append(stage[0].upper() if stage in row.stages else "·", "cyan")
    return letters


def _section(title: str, text: str) -> Text:
    section = Text("\n")
    section.append(f"{title}\n", "bold")
    return section.append(re.sub(r"(?m)^", "  ", text))
