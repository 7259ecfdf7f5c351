"""`attlas run`: fit a system with several seeds, score it cell by cell, print the table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from attlas.catalog import registry
from attlas.catalog.kinds import SYSTEM
from attlas.compare.methods import parse_call, written
from attlas.errors import UserError
from attlas.journal import Journal
from attlas.kinds.system import System, scores


class Results(Journal):
    """results.jsonl of a system: one line a seed and cell.

    Raises:
        UserError: the folder cannot be made or written, or a line cannot be read.
    """

    fields: ClassVar[Mapping[str, Any]] = {
        "system": str, "options": dict, "cell": str, "seed": int, "score": float, "baseline": float,
        "n": int,
    }  # fmt: skip

    def check(self, label: str, options: dict[str, Any]) -> None:
        """Refuse a folder of another system, or of other options.

        Raises:
            UserError: naming both.
        """
        for line in self.lines:
            if (
                line["options"] != options
                or line["system"].partition("(")[0] != label.partition("(")[0]
            ):
                raise UserError(
                    f"{self.folder} holds results of {line['system']}, this is {label}; take another "
                    "folder with --out"
                )

    @property
    def finished(self) -> set[tuple[int, str]]:
        """Seeds and cells that stand in the file."""
        return {(line["seed"], line["cell"]) for line in self.lines}


def run_command(
    name: Annotated[
        str, typer.Argument(help="needle-threading, or with options: NAME(option=...).")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... that decide the data.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results; attlas-run/NAME unless given.")
    ] = None,
) -> None:
    """Run a system: fit it, ask it, and score it beside its trivial baseline.

    Every finished cell is written at once: the same command goes on from there.
    """
    console = Console()
    label, system = parse_system(name)
    results = Results(out or Path("attlas-run") / system.registered_name)
    options = _plain(system)
    results.check(label, options)
    try:
        _run(label, system, seeds, results, console)
    except KeyboardInterrupt:
        console.print(
            f"\nstopped: {len(results.lines)} of {seeds * len(system.cells)} cells are finished and "
            f"kept in {results.folder}; the same command goes on from there"
        )
        raise typer.Exit(130) from None
    console.print(table(system, results, seeds))
    for sentence in system.conclusions(means(results, seeds)):
        console.print(sentence, highlight=False)


def parse_system(text: str) -> tuple[str, System]:
    """A system written as `name(option=value, ...)`: its label and itself.

    Raises:
        UnknownName: with the nearest system.
        UserError: the grammar or an option is wrong.
    """
    name, options = parse_call("system", text)
    entry = registry.find(name, SYSTEM)
    order = list(registry.signature(entry.object))
    given = sorted(
        options.items(), key=lambda o: order.index(o[0]) if o[0] in order else len(order)
    )
    label = written(entry.name, given)
    try:
        return label, cast(System, registry.make(entry.name, **options))
    except (TypeError, ValueError) as error:
        raise UserError(f"system {label}: {error}") from error


def _plain(system: System) -> dict[str, Any]:
    """Options as JSON holds them."""
    import json

    plain: dict[str, Any] = json.loads(json.dumps(system.options))
    return plain


def _run(label: str, system: System, seeds: int, results: Results, console: Console) -> None:
    """Score what is missing from the results."""
    todo = [(s, c) for s in range(seeds) for c in system.cells if (s, c) not in results.finished]
    if not todo:
        console.print(f"all {seeds * len(system.cells)} cells are finished in {results.folder}")
        return
    if results.lines:
        console.print(
            f"{len(results.lines)} of {seeds * len(system.cells)} cells are finished; going on"
        )
    _build(system)
    stamp = {"system": label, "options": _plain(system), **_stamp()}
    with _progress(console) as progress:
        bar = progress.add_task("", total=len(todo))
        fitted = None
        for number, (seed, cell) in enumerate(todo):
            if seed != fitted:
                progress.update(bar, description=f"fitting, seed {seed}")
                _fitted(system, seed, results.folder / f"seed-{seed}")
                fitted = seed
            progress.update(bar, description=f"{cell}, seed {seed}")
            start = time.perf_counter()
            examples = system.data(cell, seed)
            inputs = [e.input for e in examples]
            said = []
            for k, some in enumerate(_pieces(inputs, system.together)):
                said += system.predict(some)
                done = (k + 1) * system.together / len(inputs)
                progress.update(bar, completed=number + min(1.0, done))
            own = scores(system, said, examples)
            trivial = scores(system, system.guess(inputs, seed), examples)
            seconds = round(time.perf_counter() - start, 3)
            results.append({
                "cell": cell, "seed": seed, "score": sum(own) / len(own),
                "baseline": sum(trivial) / len(trivial), "n": len(own), "seconds": seconds, **stamp,
            })  # fmt: skip


def _build(system: System) -> None:
    if system.needs is None:
        system.build()
        return
    from attlas.hf.models import quiet
    from attlas.models.load import load, load_tokenizer

    quiet()
    system.build(load(system.needs), load_tokenizer(system.needs))


def _fitted(system: System, seed: int, folder: Path) -> None:
    """Fit, or take what an earlier run has fitted."""
    if folder.exists():
        try:
            system.load(folder)
            return
        except UserError:  # it was stopped while it was saved
            pass
    system.fit(seed)
    if system.state():
        system.save(folder)


def _pieces(inputs: list[Any], size: int) -> Iterator[list[Any]]:
    yield from (inputs[k : k + size] for k in range(0, len(inputs), size))


def _stamp() -> dict[str, Any]:
    import torch

    from attlas.compare.machine import machine, versions

    return {"versions": versions(), "machine": machine(torch.device("cpu"))}


def means(results: Results, seeds: int) -> dict[str, float]:
    """The mean score of each cell over its seeds."""
    found: dict[str, list[float]] = {}
    for line in results.lines:
        if line["seed"] < seeds:
            found.setdefault(line["cell"], []).append(line["score"])
    return {cell: sum(values) / len(values) for cell, values in found.items()}


def table(system: System, results: Results, seeds: int) -> Table:
    """Each cell's mean over seeds, its least and largest seed, and the baseline's mean."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("cell", f"{system.title} ↑", "least–largest seed", "baseline", "samples"):
        shown.add_column(column, justify="left" if column == "cell" else "right")
    for cell in system.cells:
        lines = [li for li in results.lines if li["cell"] == cell and li["seed"] < seeds]
        own = [100 * line["score"] for line in lines]
        trivial = [100 * line["baseline"] for line in lines]
        shown.add_row(
            Text(cell), f"{sum(own) / len(own):.1f}", f"{min(own):.1f}–{max(own):.1f}",
            f"{sum(trivial) / len(trivial):.1f}", str(sum(line["n"] for line in lines)),
        )  # fmt: skip
    return shown


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console, speed_estimate_period=600,
    )  # fmt: skip
