"""`attlas bench`: the machine, attlas on it, and what is installed beside it, in one table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import torch

    from attlas.journal import Line

GROUPS = ("machine", "attention", "window", "decode", "recurrence")
DTYPES = ("float32", "float16", "bfloat16")


def bench(
    groups: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(GROUPS)}; all unless given.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; float32 on a CPU, else bfloat16.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("attlas-bench"),
) -> None:
    """Time attlas beside PyTorch and what else is installed, against what the machine can do.

    Candidates of a cell take turns, and medians are told. Every finished cell is written at once: the
    same command goes on from there.
    """
    from attlas.bench.cells import cells
    from attlas.bench.run import Results, measure, record, setting

    console = Console()
    wanted = _known(groups or list(GROUPS))
    place = _device(device)
    kind = _dtype(dtype, place)
    results, common = Results(out), setting(place, kind)
    results.check(common)
    # What the machine can do stands beside everything.
    todo = [cell for cell in cells(place, kind) if cell.group in {*wanted, "machine"}]
    todo = [cell for cell in todo if (cell.group, cell.name) not in results.finished]
    progress = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console, transient=True,
    )  # fmt: skip
    try:
        with progress:
            bar = progress.add_task("", total=len(todo))
            for cell in todo:
                progress.update(bar, description=f"{cell.group}: {cell.name}")
                measure(cell, results, common)
                progress.advance(bar)
    except KeyboardInterrupt:
        console.print(
            f"\nstopped: {len(results.lines)} cells are finished and kept in {out}; the same command "
            "goes on from there", highlight=False,
        )  # fmt: skip
        raise typer.Exit(130) from None
    for group in GROUPS:
        if lines := [line for line in results.lines if line["group"] == group]:
            console.print(table(lines, results.lines))
    path = record(results, common, " ".join(["attlas", *sys.argv[1:]]))
    console.print(f"{common['machine']}, {common['dtype']}; numbers are in {path}", highlight=False)


def table(lines: Sequence[Line], every: Sequence[Line]) -> Table:
    """One group's cells: time, how many times SDPA's fastest, and share of what the machine can do."""
    from attlas.bench.run import best_of_pytorch, rates

    made = Table(
        box=None, pad_edge=False, header_style="bold", title=lines[0]["group"], title_justify="left"
    )
    made.add_column("size", overflow="fold")
    made.add_column("candidate", overflow="fold")
    for column in ("ms", "× SDPA", "of the machine"):
        made.add_column(column, justify="right", no_wrap=True)
    bandwidth, product = rates(every)
    for line in lines:
        best = best_of_pytorch(line["rows"])
        for number, row in enumerate(line["rows"]):
            size = Text(line["name"] if number == 0 else "")
            if "ms" not in row:
                made.add_row(size, Text(row["candidate"], "dim"), Text(row["error"], "dim"), "", "")
                continue
            told = ["" if best is None else f"{best / row['ms']:.2f}", _share(row, bandwidth, product)]
            if line["group"] == "machine":
                told = ["", _rate(row)]
            made.add_row(size, Text(row["candidate"]), f"{row['ms']:.4g}", *told)
    return made


def _share(row: dict[str, Any], bandwidth: float | None, product: float | None) -> str:
    from attlas.bench.run import share

    found = share(row, bandwidth, product)
    return "" if found is None else f"{found:.0%}"


def _rate(row: dict[str, Any]) -> str:
    """Bytes or operations a second."""
    if row["nbytes"]:
        return f"{row['nbytes'] / row['ms'] / 1e6:.4g} GB/s"
    return f"{row['flops'] / row['ms'] / 1e9:.4g} TFLOP/s"


def _known(groups: list[str]) -> list[str]:
    """The groups that are asked for.

    Raises:
        UserError: one that there is none of.
    """
    from attlas.errors import UnknownName

    for group in groups:
        if group not in GROUPS:
            raise UnknownName("group", group, GROUPS)
    return groups


def _device(device: str | None) -> torch.device:
    """The device, if it is here.

    Raises:
        UserError: it is not, or no such word.
    """
    from attlas.devices import device_here
    from attlas.errors import UserError

    if device not in (None, "cpu", "cuda"):
        raise UserError(
            f"device takes cpu or cuda, got {device!r}; CUDA_VISIBLE_DEVICES chooses among GPUs"
        )
    return device_here(device or "auto")


def _dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The type of all numbers.

    Raises:
        UserError: no such type.
    """
    import torch

    from attlas.errors import UserError

    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise UserError(f"dtype takes {', '.join(DTYPES)}, got {dtype!r}")
    found: torch.dtype = getattr(torch, dtype)
    return found
