"""All seeds of all chosen studies, one after the other; what one of them does cannot hurt the others."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attlas.compare.machine import machine, versions
from attlas.journal import Journal, Line, unwritable
from attlas.kinds.claim import Claim
from attlas.kinds.expect import Row
from attlas.study.find import Named
from attlas.study.record import record, save


class Results(Journal):
    """The seeds of a folder: what is finished, and the way to add to it.

    Raises:
        UserError: the folder cannot be made or written, or a line cannot be read.
    """

    piece = "seed"

    fields: ClassVar[Mapping[str, Any]] = {
        "study": str, "seed": int, "settings": dict, "status": str, "reason": str,
        "rows": Sequence[Sequence[float | str | None]], "versions": dict, "machine": str,
    }  # fmt: skip

    def checked(self, line: Any) -> Line:
        """A line whose rows have all that rows have now."""
        found = super().checked(line)
        try:
            found["rows"] = [list(Row(*row)) for row in found["rows"]]
        except TypeError as error:
            raise ValueError(f"one of its rows is none: {error}") from error
        return found

    def latest(self, study: Named, seed: int) -> Line | None:
        """The last line of a seed with these very settings."""
        key = _key(study, seed)
        lines = [one for one in self.lines if (one["study"], one["settings"], one["seed"]) == key]
        return lines[-1] if lines else None

    def rows(self, study: Named) -> list[Row] | None:
        """The rows of all seeds; None while one is missing."""
        lines = [self.latest(study, seed) for seed in range(study.study.seeds)]
        if any(line is None or line["status"] != "ok" for line in lines):
            return None
        return [Row(*row) for line in lines if line is not None for row in line["rows"]]


def run(chosen: Sequence[Named], results: Results, console: Console) -> None:
    """Run the seeds that are missing; those that failed before are tried again.

    Raises:
        UserError: the results cannot be written.
    """
    wanted = [(study, seed) for study in chosen for seed in range(study.study.seeds)]
    found = [results.latest(*one) for one in wanted]
    todo = [one for one, line in zip(wanted, found, strict=True) if not _ok(line)]
    if len(todo) < len(wanted):
        console.print(f"{len(wanted) - len(todo)} of {len(wanted)} seeds are finished")
    progress = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console, transient=True,
    )  # fmt: skip
    with progress:
        bar = progress.add_task("", total=len(todo))
        for study, seed in todo:
            progress.update(bar, description=f"{study.label}, seed {seed}")
            line = _guarded(study, seed)
            results.append(line)
            progress.advance(bar)
            if not _ok(line):
                console.print(f"{study.label}, seed {seed}: failed ({line['reason']})",
                              style="yellow", markup=False)  # fmt: skip


def _guarded(study: Named, seed: int) -> Line:
    """A seed's line, whatever becomes of it."""
    began = time.monotonic()
    rows: list[Row] = []
    status, reason = "ok", ""
    try:
        rows = study.study.rows(seed)
    except Exception as error:  # one study's failure is its own
        status, reason = "failed", f"{type(error).__name__}: {error}"
        gc.collect()  # what it held in its frames
    name, settings, _ = _key(study, seed)
    return {
        "study": name, "seed": seed, "settings": settings, "status": status, "reason": reason,
        "rows": [list(row) for row in rows], "seconds": round(time.monotonic() - began, 3),
        "versions": versions(), "machine": machine(torch.device(study.study.device)),
    }  # fmt: skip


def finish(study: Named, results: Results) -> dict[str, Any] | None:
    """The record of a study whose seeds are all there, written with its picture; else None.

    Raises:
        UserError: they cannot be written.
    """
    rows = results.rows(study)
    if rows is None:
        return None
    last = results.latest(study, study.study.seeds - 1)
    assert last is not None
    command = f"attlas study {_quoted(study.label)} --seeds {study.study.seeds}"
    made = record(study.about, study.study, rows, command, machine=last["machine"])
    made["versions"] |= last["versions"]
    if isinstance(study.study, Claim):
        *against, ours = study.study.labels
        made |= {"ours": ours, "against": against}
    stem = stem_of(study)
    try:
        save(made, results.folder / f"{stem}.json")
        study.study.picture(rows).savefig(results.folder / f"{stem}.png")
    except OSError as error:
        raise unwritable(results.folder, error, Results.piece) from error
    return made


def stem_of(study: Named) -> str:
    """The name of a study's files; its label may hold signs that no file system takes."""
    name, _, options = study.label.partition("(")
    return f"{name}-{hashlib.sha256(options.encode()).hexdigest()[:8]}" if options else name


def _key(study: Named, seed: int) -> tuple[str, dict[str, Any], int]:
    """What tells a seed from all others: settings as they come back from JSON."""
    name = study.label.partition("(")[0]
    return name, json.loads(json.dumps(study.study.settings)), seed


def _ok(line: Line | None) -> bool:
    return line is not None and line["status"] == "ok"


def _quoted(label: str) -> str:
    return f"'{label}'" if re.search(r"[^\w.-]", label) else label
