"""A journal: one line of JSON a finished piece of work, on the disk before the next one begins.

A run that was killed goes on where it was: lines are only ever appended, each in one write that is
flushed and synced, and a last line that was cut short is dropped and its piece done again.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from attlas.errors import UserError
from attlas.hints import fits, told

Line = dict[str, Any]


class Journal:
    """The lines of a folder, and the way to add to them.

    Raises:
        UserError: the folder cannot be made or written, or a line cannot be read.
    """

    #: The file's name, and what one line is called in messages.
    name: ClassVar[str] = "results.jsonl"
    piece: ClassVar[str] = "cell"
    #: What every line holds, with its type; and what a line may lack, as those of earlier versions do.
    fields: ClassVar[Mapping[str, Any]] = {}
    may_lack: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / self.name
        self.lines: list[Line] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab"):
                pass
            self._read()
        except OSError as error:
            raise unwritable(self.folder, error, self.piece) from error

    def checked(self, line: Any) -> Line:
        """A line that was read.

        Raises:
            ValueError: it is none of this journal's; says what is wrong.
        """
        if not isinstance(line, dict):
            raise ValueError(f"it is no object but {line!r}")
        for name, kind in {**self.may_lack, **self.fields}.items():
            if name not in line and name in self.fields:
                raise ValueError(f"it has no {name!r}")
            if name in line and not fits(line[name], kind):
                raise ValueError(f"{name} takes {told(kind)}, got {line[name]!r}")
        return dict(line)

    def append(self, line: Line) -> None:
        """Put one finished piece on the disk.

        Raises:
            UserError: it cannot be written; what stood in the file before still stands.
        """
        packed = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        size, known = self.path.stat().st_size, len(self.lines)
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(packed) != len(packed):
                    raise OSError("the line could be written only in part")
                # It counts from now on, also for a user who stops while the disk is waited for.
                self.lines.append(line)
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self.path, size)
            del self.lines[known:]
            raise unwritable(self.folder, error, self.piece) from error

    def _read(self) -> None:
        packed = self.path.read_bytes()
        good, rows = 0, packed.splitlines(keepends=True)
        for number, row in enumerate(rows, start=1):
            try:
                line = json.loads(row) if row.strip() else None
            except ValueError as error:
                if any(later.strip() for later in rows[number:]):
                    raise self._unreadable(number, "it is no JSON") from error
                warnings.warn(f"the last line of {self.path} was cut short and is dropped; its "
                              f"{self.piece} is done again", stacklevel=3)  # fmt: skip
                os.truncate(self.path, good)
                return
            if row.strip():
                try:
                    self.lines.append(self.checked(line))
                except ValueError as error:
                    raise self._unreadable(number, str(error)) from error
            good += len(row)
        if packed and not packed.endswith(b"\n"):
            with open(self.path, "ab") as file:
                file.write(b"\n")

    def _unreadable(self, number: int, why: str) -> UserError:
        return UserError(
            f"line {number} of {self.path} cannot be read ({why}); remove that line (its "
            f"{self.piece} is then done again) or take another folder with --out"
        )


def unwritable(folder: Path, error: OSError, piece: str = "cell") -> UserError:
    """The sentence for a folder that cannot be written, finished pieces being safe."""
    reason = error.strerror or str(error)
    return UserError(
        f"cannot write to {folder}: {reason}; free space or rights there, or take another folder "
        f"with --out (finished {piece}s are kept and not run again)"
    )
