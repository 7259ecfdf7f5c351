from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attlas.compare.grid import PRESETS, Grid, Preset, parse_tasks
from attlas.compare.methods import parse_methods
from tiny_folder import save

TINY = Preset("tiny", (320,), (0.1, 0.9), 1, 1, 16, 2, 2, ("full", "streaming-llm(keep=0.5)"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> Preset:
    """`--preset tiny`, beside the valid ones."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    return TINY


@pytest.fixture
def make_grid():
    def make(**changes: Any) -> Grid:
        given: dict[str, Any] = {
            "model": "m", "methods": parse_methods(["full,streaming-llm(keep=0.5)"]),
            "tasks": parse_tasks([]),
            "lengths": (320,), "preset": TINY, "device": "cpu", "dtype": "float32", "seed": 0,
        }  # fmt: skip
        return Grid(**{**given, **changes})

    return make


@pytest.fixture
def make_line():
    def make(grid: Grid, number: int, **changes: Any) -> dict[str, Any]:
        cell = grid.all_cells()[number]
        rest = {"value": 0.5, "low": 0.2, "high": 0.8, "sd": None, "floor": None, "n": 2,
                "seconds": 1.0, "kv_bytes": 10, "status": "ok", "reason": "", "seed": grid.seed,
                "preset": grid.preset.name, "device": grid.device, "dtype": grid.dtype,
                "versions": {"torch": "2"}, "machine": "a machine"}  # fmt: skip
        return {"model": grid.model, **cell._asdict(), **rest, **changes}

    return make
