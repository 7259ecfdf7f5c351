"""`attlas bench`: every candidate computes the same, and no finished cell is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attlas.bench import cells, rivals
from attlas.bench import run as running
from attlas.bench.cells import Cell, Made, Sizes
from attlas.bench.command import GROUPS
from attlas.bench.timing import interleaved
from attlas.cli import app

TINY = Sizes(4, 2, 16, (64,), ((1, 4096),), (128,), 16)
CPU, FLOAT = torch.device("cpu"), torch.float32


def tiny_cells() -> list[Cell]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "CPU", TINY)
        return list(cells.cells(CPU, FLOAT))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "CPU", TINY)
    monkeypatch.setattr(running, "ROUNDS", 1)


def asked(*words: str) -> Any:
    return CliRunner().invoke(app, ["bench", *words])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_group_has_cells_and_every_candidate_its_bytes() -> None:
    found = tiny_cells()
    assert list(dict.fromkeys(cell.group for cell in found)) == list(GROUPS)
    assert len({(cell.group, cell.name) for cell in found}) == len(found)
    for cell in found:
        made = cell.make()
        assert set(made.nbytes) == set(made.runs) >= made.exact
        assert made.flops > 0 or cell.name.startswith("copy")


@pytest.mark.parametrize("cell", tiny_cells(), ids=lambda cell: f"{cell.group} {cell.name}")
def test_candidates_of_a_cell_compute_the_same(cell: Cell) -> None:
    rows = running.measured(cell, "cpu", 1e-4)
    assert not [row for row in rows if "error" in row]
    assert all(row["ms"] > 0 for row in rows)


def test_wrong_numbers_are_told_and_not_timed() -> None:
    ones = torch.ones(4)
    made = Made(
        {"first": lambda: ones, "off": lambda: ones * 1.1, "other": lambda: ones * 2},
        {"first": 1.0, "off": 1.0, "other": 1.0}, 1.0, frozenset({"first", "off"}),
    )  # fmt: skip
    first, off, other = running.measured(Cell("decode", "none", lambda: made), "cpu", 1e-3)
    assert first["difference"] == 0.0
    assert "differ by 0.1" in off["error"]
    assert "ms" not in off
    assert "difference" not in other  # it computes something else
    assert other["ms"] > 0


def test_nan_is_wrong() -> None:
    made = Made(
        {"first": lambda: torch.ones(2), "lost": lambda: torch.full((2,), torch.nan)},
        {"first": 1.0, "lost": 1.0}, 1.0, frozenset({"first", "lost"}),
    )  # fmt: skip
    assert "error" in running.measured(Cell("decode", "none", lambda: made), "cpu", 1e-3)[1]


def test_gradients_reach_what_another_package_sees_through_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tokens_first(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        run = torch.nn.functional.scaled_dot_product_attention
        return lambda: run(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
        )

    monkeypatch.setattr(rivals, "flash_attention", tokens_first)
    cell = next(c for c in cells.cells(CPU, FLOAT) if c.name.endswith("tokens, with backward"))
    told = {row["candidate"]: row for row in running.measured(cell, "cpu", 1e-4)}
    assert "error" not in told["flash-attn"]


def test_what_a_first_run_compiles_costs_no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ROUNDS", 7)
    monkeypatch.setattr(running, "PATIENCE", 1.0)
    calls: list[int] = []

    def slow_at_first() -> torch.Tensor:
        if not calls:
            time.sleep(1.0)
        calls.append(1)
        return torch.ones(2)

    made = Made({"first": slow_at_first}, {"first": 1.0}, 1.0, frozenset({"first"}))
    running.measured(Cell("decode", "none", lambda: made), "cpu", 1e-3)
    assert len(calls) == 2 + 7


def test_a_candidate_that_fails_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*given: object, **options: object) -> Any:
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(rivals, "flash_attention", lambda *given, **options: broken)
    result = asked("attention", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = next(line for line in lines(tmp_path) if line["group"] == "attention")["rows"]
    told = {row["candidate"]: row for row in rows}
    assert told["flash-attn"]["error"] == "RuntimeError: no kernel image"
    assert told["SDPA"]["ms"] > 0
    assert "no kernel image" in result.output


def test_finished_cells_are_kept_and_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, done = running.measured, []

    def stopped(cell: Cell, *given: Any) -> list[dict[str, Any]]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(cell.name)
        return real(cell, *given)

    monkeypatch.setattr(running, "measured", stopped)
    result = asked("decode", "window", "--out", str(tmp_path))
    assert result.exit_code == 130
    assert "3 cells are finished" in result.output
    assert [line["name"] for line in lines(tmp_path)] == done
    before = done.copy()
    monkeypatch.setattr(running, "measured", lambda cell, *given: done.append(cell.name) or [])
    result = asked("decode", "window", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert done == [*before, "batch 1, 4096 keys"]
    assert len(json.loads((tmp_path / "bench.json").read_text())["cells"]) == 4


def test_times_stand_beside_the_fastest_route_and_the_machine(tmp_path: Path) -> None:
    machine = [
        {"group": "machine", "rows": [{"candidate": "copy", "ms": 1.0, "nbytes": 1e6, "flops": 0.0}]},
        {"group": "machine", "rows": [{"candidate": "product", "ms": 1.0, "nbytes": 0.0, "flops": 4e6}]},
    ]
    bandwidth, product = running.rates(machine)
    assert (bandwidth, product) == (1e9, 4e9)
    row = {"ms": 4.0, "nbytes": 2e6, "flops": 1e6}
    assert running.share(row, bandwidth, product) == 0.5  # two milliseconds of bytes in four
    assert running.share(row, None, product) is None
    times = {"SDPA": 3.0, "SDPA flash": 2.0, "attlas": 1.0}
    rows = [{"candidate": name, "ms": ms} for name, ms in times.items()]
    assert running.best_of_pytorch(rows) == 2.0
    assert running.best_of_pytorch(rows[2:]) is None


def test_candidates_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    assert set(interleaved(runs, rounds=3, warm=1)) == {"a", "b", "c"}
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_a_folder_of_another_type_is_refused(tmp_path: Path) -> None:
    assert asked("window", "--out", str(tmp_path)).exit_code == 0
    result = asked("window", "--dtype", "bfloat16", "--out", str(tmp_path))
    assert result.exit_code != 0
    assert "another dtype: float32, this is bfloat16" in str(result.exception)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["decod"], "group"), (["--device", "gpu"], "device takes cpu or cuda, got 'gpu'"),
        (["--dtype", "int8"], "dtype takes"),
        pytest.param(["--device", "cuda"], "PyTorch sees no GPU", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="there is a GPU")),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(words: list[str], named: str, tmp_path: Path) -> None:
    result = asked(*words, "--out", str(tmp_path / "none"))
    assert result.exit_code != 0
    assert named in str(result.exception)
    assert not (tmp_path / "none").exists()
