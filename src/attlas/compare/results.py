"""results.jsonl of a comparison: one line a finished cell, on the disk before the next cell begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_type_hints

from attlas.compare.grid import Cell, Grid
from attlas.errors import UserError
from attlas.journal import Journal, Line, unwritable

__all__ = ["Line", "Results", "cell_of", "unwritable"]

#: What all lines of a folder must have in common with the grid that is run into it.
SETTING = ("model", "seed", "dtype", "device", "preset")


class Results(Journal):
    """The results of a folder: what is finished, and the way to add to it.

    Raises:
        UserError: the folder cannot be made or written, or a line cannot be read.
    """

    fields: ClassVar[Mapping[str, Any]] = {
        **get_type_hints(Cell), **dict.fromkeys(SETTING, str), "seed": int, "status": str, "n": int,
        "value": float | None,
    }  # fmt: skip
    may_lack: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("low", "high", "sd", "floor"), float | None), "by_head": list[list[float]],
    }  # fmt: skip

    @property
    def finished(self) -> set[Cell]:
        """The cells that stand in the file."""
        return {cell_of(line) for line in self.lines}

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


def cell_of(line: Line) -> Cell:
    """The cell that a line holds."""
    return Cell(line["method"], line["task"], line["length"], line["depth"], line["metric"])
