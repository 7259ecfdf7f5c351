"""Cells one after the other, each a line on the disk as soon as it is measured, and the table of them."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from attlas.bench.cells import Cell
from attlas.bench.rivals import Run, installed
from attlas.bench.timing import QUEUED, interleaved
from attlas.compare.machine import machine, versions
from attlas.errors import UserError
from attlas.journal import Journal, Line, unwritable
from attlas.tasks.roof import clock

#: Rounds a cell, and seconds after which it has no more of them.
ROUNDS, PATIENCE = 15, 20.0
#: Numbers further than this from the first candidate's, over its largest, are wrong: by type.
WRONG = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}


class Results(Journal):
    """results.jsonl of a machine: one line a cell.

    Raises:
        UserError: the folder cannot be made or written, or a line cannot be read.
    """

    fields: ClassVar[Mapping[str, Any]] = {
        "group": str, "name": str, "device": str, "dtype": str, "machine": str, "versions": dict,
        "rows": list,
    }  # fmt: skip

    def check(self, setting: Mapping[str, Any]) -> None:
        """Refuse a folder of another machine, type or version, whose times cannot stand beside these.

        Raises:
            UserError: naming both.
        """
        for line in self.lines:
            for key, value in setting.items():
                if line[key] != value:
                    raise UserError(
                        f"{self.folder} holds results of another {key}: {line[key]}, this is {value}; "
                        "take another folder with --out"
                    )

    @property
    def finished(self) -> set[tuple[str, str]]:
        """Groups and names of the cells that stand in the file."""
        return {(line["group"], line["name"]) for line in self.lines}


def setting(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What all lines of a folder have in common."""
    return {
        "device": device.type, "dtype": str(dtype).removeprefix("torch."), "machine": machine(device),
        "versions": versions() | installed(),
    }  # fmt: skip


def measure(cell: Cell, results: Results, common: Mapping[str, Any]) -> None:
    """Measure a cell and put it on the disk.

    Raises:
        UserError: it cannot be written.
    """
    rows = measured(cell, common["device"], WRONG[common["dtype"]])
    results.append({"group": cell.group, "name": cell.name, **common, "rows": rows})
    gc.collect()
    if common["device"] == "cuda":
        torch.cuda.empty_cache()


def measured(cell: Cell, device: str, wrong: float) -> list[dict[str, Any]]:
    """A row for each candidate: its milliseconds, or why there are none."""
    try:
        made = cell.make()
    except (RuntimeError, ValueError) as error:  # too large for this device
        return [{"candidate": "all", "error": _said(error)}]
    rows: dict[str, dict[str, Any]] = {}
    first: Tensor | None = None
    for name, each in made.runs.items():
        rows[name] = {"candidate": name}
        try:
            began = clock(torch.device(device))
            found = _joined(each())
            rows[name]["first_s"] = clock(torch.device(device)) - began
        except Exception as error:  # whatever another package raises is its own
            rows[name]["error"] = _said(error)
            continue
        first = found if first is None else first
        if name in made.exact:
            difference = float((found - first).abs().max() / first.abs().max())
            rows[name]["difference"] = difference
            if not difference <= wrong:
                rows[name]["error"] = f"its numbers differ by {difference:.2g} of the largest"
    runs = {name: each for name, each in made.runs.items() if "error" not in rows[name]}
    for name, ms in _times(runs, device).items():
        rows[name] |= {"ms": ms, "nbytes": made.nbytes[name], "flops": made.flops}
    return list(rows.values())


def _times(runs: Mapping[str, Run], device: str) -> dict[str, float]:
    """Interleaved medians, of fewer rounds where a round is long; first runs, which compile, tell not."""
    began = clock(torch.device(device))
    for each in runs.values():
        each()
    spent = (clock(torch.device(device)) - began) * (QUEUED if device == "cuda" else 1)
    rounds = max(3, min(ROUNDS, int(PATIENCE / max(spent, 1e-9))))
    return interleaved(runs, rounds=rounds, device=device, warm=0) if runs else {}


def _joined(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A result and its gradients as one row in float32."""
    tensors = found if isinstance(found, tuple) else (found,)
    return torch.cat([x.detach().float().flatten() for x in tensors])


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def record(results: Results, common: Mapping[str, Any], command: str) -> Path:
    """`bench.json`: all cells with the machine and the versions.

    Raises:
        UserError: it cannot be written.
    """
    told = [{key: line[key] for key in ("group", "name", "rows")} for line in results.lines]
    path = results.folder / "bench.json"
    try:
        path.write_text(json.dumps({"command": command, **common, "cells": told}, indent=1) + "\n")
    except OSError as error:
        raise unwritable(results.folder, error, Results.piece) from error
    return path


def rates(lines: Sequence[Line]) -> tuple[float | None, float | None]:
    """(bytes, operations) a second of this machine, where they were measured."""
    found: dict[str, float] = {}
    for line in lines:
        for row in line["rows"] if line["group"] == "machine" else ():
            if "ms" in row:
                amount = row["nbytes"] or row["flops"]
                found[row["candidate"]] = amount / row["ms"] * 1e3
    return found.get("copy"), found.get("product")


def share(row: Mapping[str, Any], bandwidth: float | None, product: float | None) -> float | None:
    """How much of what the machine can do a candidate reaches: its least time over its time."""
    if "ms" not in row or bandwidth is None or product is None:
        return None
    least = max(row["nbytes"] / bandwidth, row["flops"] / product)
    return float(least / row["ms"] * 1e3)


def best_of_pytorch(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Milliseconds of SDPA's fastest route in a cell."""
    found = [row["ms"] for row in rows if row["candidate"].startswith("SDPA") and "ms" in row]
    return min(found, default=None)
