"""results.jsonl of a training: one line a finished run, with its curves, scores and costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from attlas.errors import UserError
from attlas.journal import Journal, Line, unwritable
from attlas.train.checkpoint import written_whole
from attlas.train.plan import Plan, Run

#: Ends of a run that stand; a run that failed otherwise is tried again.
FINAL = ("ok", "diverged", "out of memory")


class Results(Journal):
    """The results of a folder: what is finished, and the way to add to it.

    Raises:
        UserError: the folder cannot be made or written, or a line cannot be read.
    """

    piece = "run"
    fields: ClassVar[Mapping[str, Any]] = {
        "mechanism": str, "seed": int, "settings": dict, "status": str, "scores": Mapping[str, float],
        "curve": Sequence[Sequence[float]],
    }  # fmt: skip
    may_lack: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(
            ("parameters", "operations", "seconds", "step_ms", "cache_bytes_per_token",
             "cache_growth", "diverged_at"), float | None,
        ),
        "score_curve": Sequence[Sequence[float]],
    }  # fmt: skip

    @property
    def latest(self) -> dict[Run, Line]:
        """The last line of every run."""
        return {run_of(line): line for line in self.lines}

    def todo(self, plan: Plan) -> list[Run]:
        """What is missing, in its order; runs that failed before come last."""
        latest = self.latest
        missing = [run for run in plan.runs() if run not in latest]
        failed = [r for r in plan.runs() if r in latest and latest[r]["status"] not in FINAL]
        return missing + failed

    def check(self, plan: Plan) -> None:
        """Refuse a folder in which something else was trained.

        Raises:
            UserError: naming the first difference and what to do.
        """
        path = self.folder / "settings.json"
        found = [line["settings"] for line in self.lines]
        try:
            if path.exists():
                found.append(json.loads(path.read_text("utf-8")))
        except ValueError:
            raise UserError(f"{path} cannot be read; remove it, or take another --out") from None
        for settings in found:
            for key, value in plan.settings.items():
                if settings.get(key) != value:
                    raise UserError(
                        f"{self.folder} holds runs of other settings ({key} {settings.get(key)!r}, "
                        f"now {value!r}); take another folder with --out, or move {self.path} away"
                    )

    def begin(self, plan: Plan) -> None:
        """Put the settings into the folder, before anything is trained.

        Raises:
            UserError: they cannot be written.
        """
        try:
            packed = json.dumps(plan.settings, indent=1).encode()
            written_whole(self.folder / "settings.json", packed)
        except OSError as error:
            raise unwritable(self.folder, error, self.piece) from error


def run_of(line: Line) -> Run:
    """The run that a line holds."""
    return Run(line["mechanism"], line["seed"])
