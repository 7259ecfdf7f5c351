"""`attlas train`: from options to a plan, from the plan to runs, from runs to the report."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from attlas.catalog.kinds import LAYER, MODULE
from attlas.devices import device_here
from attlas.errors import UnknownName, UserError
from attlas.journal import unwritable
from attlas.tasks.train import Task
from attlas.train.plan import Plan, parse_mechanisms, parse_task
from attlas.train.results import Results

#: What is compared unless mechanisms are given, by the kind that the task trains.
DEFAULTS = {
    LAYER: ["softmax,differential-transformer,qk-norm"], MODULE: ["none,ela-efficient-local"],
}  # fmt: skip
DTYPES = ("float32", "bfloat16")
#: Widths up to which a CPU trains on one thread, unless OMP_NUM_THREADS says otherwise.
SMALL = 128


def train(
    task: Annotated[str, typer.Option(help="recall, induction(half=24), ...")] = "recall",
    mechanisms: Annotated[
        list[str] | None,
        typer.Option(help="softmax,qk-norm(...),... or, on pictures, none,ela-efficient-local,..."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each mechanism.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step, over all processes.")] = 64,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts to read these rows in.")] = 1,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    dim: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model, or stages.")] = 2,
    heads: Annotated[int, typer.Option(min=1, help="Heads of each layer.")] = 4,
    tested: Annotated[int, typer.Option(min=1, help="Rows of each test.")] = 512,
    save: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder of results; attlas-train/TASK unless given.")
    ] = None,
) -> None:
    """Train the same small model with each mechanism, on the same data in the same order.

    Every finished run is written at once, and checkpoints between: the same command goes on from
    there. `accelerate launch -m attlas train ...` spreads the rows over GPUs and machines.
    """
    where = device_here(device)
    kind = where.type
    number = str(where) if kind == "cuda" and where.index is not None else ""
    label, made = parse_task(task)
    if not 0 < rate < float("inf"):
        raise UserError(f"rate must be a positive number, got {rate}")
    plan = Plan(
        task=label, mechanisms=parse_mechanisms(mechanisms or DEFAULTS[made.trains]),
        seeds=seeds, steps=steps, batch=batch, accumulate=accumulate, rate=rate, dim=dim,
        layers=layers, heads=heads, tested=tested, save=save, device=kind, dtype=_dtype(dtype, kind),
    )  # fmt: skip
    _run(plan, made, out or Path("attlas-train") / made.name, number)


def _run(plan: Plan, task: Task, out: Path, number: str) -> None:
    from attlas.train.build import check_fit
    from attlas.train.run import accelerated
    from attlas.train.run import train as train_all

    if plan.device == "cpu" and plan.dim <= SMALL and "OMP_NUM_THREADS" not in os.environ:
        # Threads wait for each other longer than so little work takes, on a shared machine 20 times.
        torch.set_num_threads(1)
    if number:
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", number)
    accelerator = accelerated(plan.device, plan.dtype)
    console = Console(quiet=not accelerator.is_main_process)
    parts = accelerator.num_processes * plan.accumulate
    if plan.batch % parts:
        raise UserError(
            f"batch must be a multiple of processes × accumulate = {parts}, got {plan.batch}"
        )
    check_fit(plan, task)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        results = Results(out)
    for warning in said:
        console.print(f"[yellow]warning:[/] {warning.message}", highlight=False)
    results.check(plan)
    if accelerator.is_main_process:
        results.begin(plan)
    try:
        train_all(plan, task, results, accelerator, console)
    except KeyboardInterrupt:
        console.print(
            f"\nstopped: {len(plan.runs()) - len(results.todo(plan))} of {len(plan.runs())} runs are "
            f"finished and kept in {out}; the same command goes on from the last checkpoint"
        )
        raise typer.Exit(130) from None
    if accelerator.is_main_process:
        _show(plan, task, results, console)
    accelerator.end_training()


def _show(plan: Plan, task: Task, results: Results, console: Console) -> None:
    """The table in the terminal, and table.md, curves.png and report.html beside the results."""
    import attlas.view.training.picture as picture
    import attlas.view.training.report as report
    import attlas.view.training.table as table
    from attlas.train.summary import summarize

    summary = summarize(results, plan, task)
    console.print(table.terminal(summary))
    try:
        table.write(summary, results.folder / "table.md")
        picture.write(summary, results.folder / "curves.png")
        report.write(summary, results.folder / "report.html")
    except OSError as error:
        raise unwritable(results.folder, error, Results.piece) from error
    console.print(f"report: {results.folder / 'report.html'}", highlight=False)


def _dtype(name: str, device: str) -> str:
    """float32 on a CPU, where narrower types are slow; bfloat16 by autocast on a GPU."""
    if name == "auto":
        return "float32" if device == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise UnknownName("dtype", name, [*DTYPES, "auto"])
    return name
