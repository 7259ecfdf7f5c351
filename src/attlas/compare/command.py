"""`attlas compare`: from options to a plan, from the plan to results, from results to the report."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from attlas.calibration.command import ensure
from attlas.compare.fit import check_fit
from attlas.compare.grid import PRESETS, Grid, fitting_lengths, parse_lengths, parse_tasks
from attlas.compare.methods import comparable, parse_methods
from attlas.compare.results import Results, unwritable
from attlas.compare.run import run
from attlas.devices import device_here
from attlas.errors import UnknownName, UserError
from attlas.models.load import load, load_config, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compare(
    model: Annotated[str, typer.Option(help="Name, folder or Hugging Face id.")] = "smollm2",
    methods: Annotated[
        list[str] | None,
        typer.Option(help="full,snapkv(keep=0.25),...; the preset's eight unless given."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="needle,speed,...; all of `attlas list --kind task` unless given."),
    ] = None,
    lengths: Annotated[list[str] | None, typer.Option(help="Tokens of context: 1024,2048.")] = None,
    preset: Annotated[
        str,
        typer.Option(help="quick, full, cache: all caches, or prefill: what thins out prompts."),
    ] = "quick",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of results; attlas-compare/MODEL-PRESET unless given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides texts, cities and numbers.")] = 0,
) -> None:
    """Compare attention methods on a language model: what each keeps, at what memory and speed.

    Every finished number is written at once: a run that was stopped goes on where it was.
    """
    console = Console()
    if preset not in PRESETS:
        raise UnknownName("preset", preset, PRESETS)
    chosen = PRESETS[preset]
    planned_methods = parse_methods(methods or chosen.methods or comparable(preset))
    planned_tasks = parse_tasks(tasks or [])
    asked = parse_lengths(lengths or [])
    where = device_here(device)
    kind = _dtype(dtype, where)
    folder = out or Path("attlas-compare") / f"{Path(model).name}-{preset}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        results = Results(folder)
    for warning in said:
        console.print(f"[yellow]warning:[/] {warning.message}", highlight=False)
    config = load_config(model).get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    grid = Grid(
        model=model,
        methods=planned_methods,
        tasks=planned_tasks,
        lengths=fitting_lengths(asked, chosen, model, positions),
        preset=chosen,
        device=str(where),
        dtype=kind,
        seed=seed,
    )
    results.check(grid)
    loaded, tokenizer = _load(model, where, DTYPES[kind])
    ensure((part for method in planned_methods for part in method.parts()), loaded, tokenizer, console)
    check_fit(grid, loaded, tokenizer)
    try:
        run(grid, loaded, tokenizer, results, console)
    except KeyboardInterrupt:
        console.print(
            f"\nstopped: {len(results.lines)} of {len(grid.all_cells())} cells are finished and "
            f"kept in {folder}; the same command goes on from there"
        )
        raise typer.Exit(130) from None
    _show(results, grid, console)


def _show(results: Results, grid: Grid, console: Console) -> None:
    """The table in the terminal, and table.md, pareto.png and report.html beside the results."""
    import attlas.view.pareto as pareto
    import attlas.view.report as report
    import attlas.view.table as table
    from attlas.compare.summary import summarize

    summary = summarize(results.lines, grid)
    console.print(table.terminal(summary))
    try:
        table.write(summary, results.folder / "table.md")
        pareto.write(summary, results.folder / "pareto.png")
        report.write(summary, results.folder / "report.html")
    except OSError as error:
        raise unwritable(results.folder, error) from error
    console.print(f"report: {results.folder / 'report.html'}", highlight=False)


def _dtype(name: str, device: torch.device) -> str:
    """float32 on a CPU, where narrower types are slow; bfloat16 on a GPU."""
    if name == "auto":
        return "float32" if device.type == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise UnknownName("dtype", name, [*DTYPES, "auto"])
    return name


def _load(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer, on the device, weights in the dtype.

    Raises:
        UserError: nothing can be loaded, or it is no language model.
    """
    from attlas.hf.models import quiet

    quiet()
    model, tokenizer = load(name), load_tokenizer(name)
    if model.get_output_embeddings() is None:
        raise UserError(f"model {name!r} predicts no next tokens; compare needs a language model")
    model.to(device)
    # Rotary frequencies are buffers that must stay float32, so weights alone are cast.
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model, tokenizer
