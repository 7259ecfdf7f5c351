"""A study's record: what was claimed, how it was tried, all numbers, the verdict; a JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attlas.kinds.expect import Row, by_label, variance
from attlas.kinds.study import Study


def record(
    name: str, study: Study, rows: Sequence[Row], command: str, *, machine: str
) -> dict[str, Any]:
    """What came of a study with all its seeds.

    Args:
        name: of the study, or of the mechanism that a claim is about.
        study: with its options.
        rows: of all seeds.
        command: that repeats it.
        machine: that it ran on, in words.
    """
    groups = by_label(rows)
    return packed(
        name, study.claim, study.set_up, command,
        {label: [row.value for row in found] for label, found in groups.items()},
        study.verdict(rows), {label: (f[0].unit, f[0].better) for label, f in groups.items()},
        machine=machine,
    )  # fmt: skip


def packed(
    name: str, claim: str, set_up: str, command: str, numbers: Mapping[str, Sequence[float]],
    verdict: str, told: Mapping[str, tuple[str, str]], *, machine: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A record of numbers by label; `told` has each label's (unit, "higher" or "lower")."""
    import torch

    units, betters = ({told[label][k] for label in numbers} for k in (0, 1))
    alike = len(units) == len(betters) == 1
    found = [
        {"of": label, "mean": statistics.mean(x), "spread": math.sqrt(variance(x)), "seeds": len(x),
         "all": list(x)}
        | ({} if alike else dict(zip(("unit", "better"), told[label], strict=True)))
        for label, x in numbers.items()
    ]  # fmt: skip
    return {
        "mechanism": name, "claim": claim, "set_up": set_up, "command": command,
        "better": betters.pop() if alike else "", "unit": units.pop() if alike else "",
        "numbers": found, "verdict": verdict,
        "machine": {"device": machine or platform.processor() or platform.machine(),
                    "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": version("transformers")},
    }  # fmt: skip


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """The rows of a record, by which its verdict can be found again."""
    return [
        Row(n["of"], value, n.get("unit", record["unit"]), n.get("better", record["better"]))
        for n in record["numbers"]
        for value in n["all"]
    ]


def told(record: Mapping[str, Any]) -> list[str]:
    """Each number as tables show it: its mean, the standard deviation over seeds, and its unit."""
    lines = []
    for n in record["numbers"]:
        spread = f"{n['spread']:.2g}" if n["spread"] < 100 else f"{n['spread']:.0f}"
        mean = f"{n['mean']:.4g}" + (f" ± {spread}" if n["seeds"] > 1 else "")
        lines.append(f"{n['of']}: {mean} {n.get('unit', record['unit'])}".rstrip())
    return lines


def save(made: Mapping[str, Any], path: Path) -> None:
    """Write a record as the committed ones are written."""
    text = json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
