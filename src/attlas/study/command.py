"""`attlas study`: run studies and claims with several seeds, and tell whether they hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from attlas.study.find import Named
    from attlas.study.run import Results

STYLES = {"holds": "green", "partly": "yellow", "does not hold here": "red"}


def study(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="layernorm-expressivity, qk-norm(steps=300), ..., claims, studies."),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Only tell what there is.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Each study's own unless given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("attlas-study"),
) -> None:
    """Try papers' claims: run studies with several seeds, and tell whether the claims hold.

    Every finished seed is written at once: the same command goes on from there.
    """
    console = Console()
    if listed:
        console.print(_list())
        return
    from attlas.devices import device_here
    from attlas.study.find import chosen
    from attlas.study.run import Results, run

    given = {"seeds": seeds, "device": str(device_here(device, auto=False))}
    todo = chosen(names or [], **{name: v for name, v in given.items() if v is not None})
    _few_threads(device)
    results = Results(out)
    try:
        run(todo, results, console)
    except KeyboardInterrupt:
        console.print(
            f"\nstopped: finished seeds are kept in {out}; the same command goes on from there",
            highlight=False,
        )
        raise typer.Exit(130) from None
    raise typer.Exit(_show(todo, results, console))


def _show(todo: list[Named], results: Results, console: Console) -> int:
    """The table of what came out; 1 if a study could not be tried, else 0."""
    from attlas.study.record import told
    from attlas.study.run import finish

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("study", "claim", "measured", "verdict"):
        table.add_column(column, overflow="fold", no_wrap=column == "verdict")
    missing = 0
    for one in todo:
        made = finish(one, results)
        if made is None:
            missing += 1
            table.add_row(Text(one.label), Text(one.study.claim), "", Text("not tried", "red"))
            continue
        table.add_row(Text(one.label), Text(made["claim"]), Text("\n".join(told(made))),
                      Text(made["verdict"], STYLES[made["verdict"]]))  # fmt: skip
    console.print(table)
    console.print(f"records and pictures are in {results.folder}", highlight=False)
    return 1 if missing else 0


def _list() -> Table:
    from attlas.study.find import claims, options_of, studies

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "claim", "options"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for name, each in {**studies(), **claims()}.items():
        table.add_row(Text(name), Text(each.claim), Text(options_of(each), "dim"))
    return table


def _few_threads(device: str) -> None:
    """One thread on a CPU, unless OMP_NUM_THREADS says otherwise: studies are small, and repeat so."""
    import os

    import torch

    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
