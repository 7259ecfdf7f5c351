"""`attlas verify`: this machine, then contract checks and reference vectors, error beside bound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from attlas.catalog import registry
from attlas.contract.cases import Case, adapters, checkout_cases, load_cases, run_case
from attlas.contract.machine import machine, routes
from attlas.contract.measure import Subject, subject_of
from attlas.contract.result import Result
from attlas.contract.run import checks_of, results_of
from attlas.errors import UnknownName

STYLES = {
    "passed": "green", "failed": "bold red", "no adapter": "yellow", "expected failure": "cyan",
}  # fmt: skip


def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Mechanisms or folders of cases; all unless given.", show_default=False),
    ] = None,
    cases: Annotated[
        Path | None,
        typer.Option(help="A folder of reference cases; those of the checkout unless given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Hold the mechanisms to their contract and to published numbers, on this machine.

    Exit code 1 when anything misses its bound; a case without an adapter is listed and is no miss.
    """
    found = checkout_cases() if cases is None else load_cases(cases)
    subjects, found = _chosen(names or [], found)
    out, err = Console(), Console(stderr=True)
    if not as_json:
        _print_machine(out)
    results: list[Result] = []
    for result in _run(subjects, found, err):
        results.append(result)
        if as_json:
            typer.echo(result.line())
    if not as_json:
        _print_results(out, results, each=bool(names))
    if any(result.status == "failed" for result in results):
        raise typer.Exit(1)


def _chosen(names: list[str], cases: list[Case]) -> tuple[list[Subject], list[Case]]:
    """The subjects and cases that the names ask for; all when there are none.

    Raises:
        UnknownName: a name that is neither a mechanism nor a folder of cases.
    """
    if not names:
        return [subject_of(entry.name) for entry in registry.entries()], cases
    mechanisms = {known: e.name for e in registry.entries() for known in e.names}
    folders = {case.name for case in cases}
    held_by = {folder: name for folder, (_, name) in adapters().items()}
    wanted: list[str] = []
    for name in names:
        key = name.strip().lower().replace("_", "-")
        if key not in mechanisms and name not in folders:
            raise UnknownName("mechanism or case", name, {*mechanisms, *folders})
        wanted.append(mechanisms.get(key, name))
    subjects = [subject_of(name) for name in wanted if name in mechanisms]
    chosen = [c for c in cases if c.name in wanted or held_by.get(c.name) in wanted]
    return subjects, chosen


def _run(subjects: list[Subject], cases: list[Case], err: Console) -> Iterator[Result]:
    total = sum(len(checks_of(subject)) for subject in subjects) + len(cases)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=err, transient=True, disable=not err.is_terminal,
    )  # fmt: skip
    with progress:
        task = progress.add_task("verify", total=total)
        for subject in subjects:
            progress.update(task, description=subject.name)
            for result in results_of(subject):
                progress.advance(task)
                yield result
        for case in cases:
            progress.update(task, description=case.label, advance=1)
            yield from run_case(case)


def _print_machine(out: Console) -> None:
    for what, value in machine().items():
        out.print(f"[bold]{what:>12}[/bold]  {value}", highlight=False)
    for report in routes():
        mark = "[green]runs[/green]" if report.runs else "[red]does not run[/red]"
        line = f"{'route':>12}  {report.route} on {report.device}: {mark}, "
        out.print(line, end="", highlight=False)
        out.print(report.says, markup=False, highlight=False)
    out.print()


def _print_results(out: Console, results: list[Result], each: bool) -> None:
    """A row for each check when names were given, else for each mechanism and case its closest."""
    table = Table(box=None, header_style="bold")
    for heading in ("mechanism", "held against", "check", "error", "bound", "status"):
        number = heading in ("error", "bound")
        table.add_column(
            heading, overflow="fold", justify="right" if number else "left",
            no_wrap=heading in ("mechanism", "status"),
        )  # fmt: skip
    unheld = sorted(result.case for result in results if result.status == "no adapter")
    results = [result for result in results if result.status != "no adapter"]
    for row in results if each else _closest(results):
        table.add_row(
            row.name, row.case, row.check, _number(row.error), _number(row.bound),
            f"[{STYLES[row.status]}]{row.status}[/]",
        )  # fmt: skip
    if results:
        out.print(table)
    if unheld:
        out.print(f"\n{len(unheld)} cases without adapter:", style=STYLES["no adapter"])
        out.print("  " + ", ".join(unheld), highlight=False)
    for result in results:
        if result.status in ("failed", "expected failure"):
            out.print(f"\n{result.status}: {result.name} [{result.case}] {result.check}",
                      style=STYLES[result.status], markup=False, highlight=False)  # fmt: skip
            out.print(f"  {result.reason}", markup=False, highlight=False)
    counts = {status: sum(r.status == status for r in results) for status in STYLES}
    counts["no adapter"] = len(unheld)
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    out.print(f"\n{len(results) + len(unheld)} checks: {told or 'none ran'}", highlight=False)


def _closest(results: list[Result]) -> Iterator[Result]:
    """Of each mechanism's contract and of each case the result nearest to its bound, or missing it."""
    rows: dict[tuple[str, str], list[Result]] = {}
    folders = {folder for folder, _ in adapters().items()}
    for result in results:
        is_case = result.case.split("/")[0] in folders
        rows.setdefault((result.name, result.case if is_case else "contract"), []).append(result)
    for (name, against), group in rows.items():
        worst = max(group, key=_rank)
        label = against if against != "contract" else f"contract, {len(group)} checks"
        yield Result(name, label, worst.check, worst.error, worst.bound, worst.status)


def _rank(result: Result) -> tuple[bool, float]:
    error, bound = result.error or 0.0, result.bound or 0.0
    return result.status == "failed", error / bound if bound else 0.0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}" if value else "0"
