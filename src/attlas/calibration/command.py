"""`attlas calibrate`: statistics of a model for a part, into the user's cache folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from attlas.calibration.parts import Calibrated
from attlas.calibration.run import Fits, calibrate, windows
from attlas.calibration.statistics import default_path
from attlas.catalog import registry
from attlas.errors import UserError


def calibrate_command(
    part: Annotated[str, typer.Argument(help="q-filters, or with options: loki(rotary='before').")],
    model: Annotated[str, typer.Option(help="Name, folder or Hugging Face id.")] = "smollm2",
    text: Annotated[
        Path | None, typer.Option(help="A text file; Shakespeare unless given.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 16384,
    length: Annotated[int, typer.Option(help="Tokens of a passage.")] = 1024,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; the user's cache folder unless given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides which passages of Shakespeare.")] = 0,
) -> None:
    """Gather the statistics of a model that a part needs before it can be attached.

    What was read is kept: interrupted, the same command goes on where it was.
    """
    from attlas.compare.methods import parse_call
    from attlas.models.load import load, load_tokenizer

    name, options = parse_call("part", part)
    made = _made(name, options)
    if not isinstance(made, Calibrated):
        raise UserError(f"{name} needs no calibration; attach it as it is")
    said = None
    if text is not None:
        try:
            said = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"text {text} cannot be read: {error}") from error
    loaded, tokenizer = load(model), load_tokenizer(model)
    texts = windows(tokenizer, said, tokens=tokens, length=length, seed=seed)
    path = out or default_path(made.calibration_key, loaded)
    _into(path, made, loaded, texts, Console())


def _made(name: str, options: dict[str, Any]) -> Any:
    """The part; a budget, which statistics do not rest on, is the example's where none is given."""
    try:
        return registry.make(name, **options)
    except ValueError:
        example = registry.find(name).example
        if "keep" in options or "keep" not in example:
            raise
        return registry.make(name, keep=example["keep"], **options)


def ensure(parts: Iterable[Any], model: Any, tokenizer: Any, console: Console) -> None:
    """Calibrate for those parts whose statistics are missing and can be summed in a minute or so.

    Parts whose statistics are optimised say themselves, when they are attached, what to run.
    """
    for part in parts:
        if not isinstance(part, Calibrated) or isinstance(part, Fits) or part.calibration:
            continue
        path = default_path(part.calibration_key, model)
        if not path.exists():
            _into(path, part, model, windows(tokenizer), console)


def _into(
    path: Path, part: Calibrated, model: Any, texts: Sequence[Tensor], console: Console
) -> None:
    """Calibrate with a progress bar; what was read is kept beside `path` until it is finished."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    partial = path.with_name(path.name + ".partial")
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"calibrating {part.calibration_key}", total=len(texts))
        try:
            found = calibrate(
                model, part, texts, partial=partial,
                tick=lambda done, total: progress.update(bar, completed=done, total=total),
            )  # fmt: skip
        except KeyboardInterrupt:
            progress.stop()
            console.print(f"stopped; what was read is kept in {partial}, the same command goes on")
            raise typer.Exit(130) from None
    found.save(path)
    console.print(f"{len(found.tensors)} tensors for {part.calibration_key}: {path}")
