"""results.jsonl: one line a finished cell, on the disk before the next cell begins.

A run that was killed goes on where it was: lines are only ever appended, each in one write that is
flushed and synced, and a last line that was cut short is dropped and measured again.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from attlas.compare.grid import Cell, Grid
from attlas.errors import UserError

NAME = "results.jsonl"
#: What all lines of a folder must have in common with the grid that is run into it.
SETTING = ("model", "seed", "dtype", "device", "preset")

Line = dict[str, Any]


class Results:
    """The results file of a folder: what is finished, and the way to add to it.

    Raises:
        UserError: the folder cannot be made or written, or a line in its middle cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / NAME
        self.lines: list[Line] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab"):
                pass
            self._read()
        except OSError as error:
            raise unwritable(self.folder, error) from error

    @property
    def finished(self) -> set[Cell]:
        """The cells that stand in the file."""
        return {cell_of(line) for line in self.lines}

    def append(self, line: Line) -> None:
        """Put one finished cell on the disk.

        Raises:
            UserError: it cannot be written; what stood in the file before still stands.
        """
        packed = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        size = self.path.stat().st_size
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(packed) != len(packed):
                    raise OSError("the line could be written only in part")
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self.path, size)
            raise unwritable(self.folder, error) from error
        self.lines.append(line)

    def check(self, grid: Grid) -> None:
        """Refuse a folder that holds cells which are not in this grid.

        Raises:
            UserError: naming the first difference and what to do.
        """
        remedy = f"take another folder with --out, or move {self.path} away"
        planned = set(grid.all_cells())
        setting = {"model": grid.model, "seed": grid.seed, "dtype": grid.dtype,
                   "device": grid.device, "preset": grid.preset.name}  # fmt: skip
        for line in self.lines:
            for key in SETTING:
                if line[key] != setting[key]:
                    raise UserError(
                        f"{self.folder} holds results of another grid ({key} {line[key]!r}, now "
                        f"{setting[key]!r}); {remedy}"
                    )
            if cell_of(line) not in planned:
                cell = cell_of(line)
                depth = "" if cell.depth is None else f", depth {cell.depth}"
                raise UserError(
                    f"{self.folder} holds results of another grid ({cell.method}, {cell.task}, "
                    f"length {cell.length}{depth} is not in this one); {remedy}"
                )

    def _read(self) -> None:
        packed = self.path.read_bytes()
        good, rows = 0, packed.splitlines(keepends=True)
        for number, row in enumerate(rows, start=1):
            try:
                if row.strip():
                    self.lines.append(_checked(json.loads(row)))
            except (ValueError, KeyError, TypeError) as error:
                if any(later.strip() for later in rows[number:]):
                    raise UserError(
                        f"line {number} of {self.path} cannot be read; remove that line (its cell "
                        "is then measured again) or take another folder with --out"
                    ) from error
                warnings.warn(f"the last line of {self.path} was cut short and is dropped; its "
                              "cell is measured again", stacklevel=3)  # fmt: skip
                os.truncate(self.path, good)
                return
            good += len(row)
        if packed and not packed.endswith(b"\n"):
            with open(self.path, "ab") as file:
                file.write(b"\n")


def cell_of(line: Line) -> Cell:
    """The cell that a line holds."""
    return Cell(line["method"], line["task"], line["length"], line["depth"], line["metric"])


def unwritable(folder: Path, error: OSError) -> UserError:
    """The sentence for a folder that cannot be written, finished cells being safe."""
    reason = error.strerror or str(error)
    return UserError(
        f"cannot write to {folder}: {reason}; free space or rights there, or take another folder "
        "with --out (finished cells are kept and not run again)"
    )


def _checked(line: Any) -> Line:
    for key in (*Cell._fields, *SETTING, "value", "n", "status"):
        line[key]
    hash(cell_of(line))
    return dict(line)
