from __future__ import annotations

import errno
import json
import os

import pytest

from attlas.compare.results import Results, cell_of
from attlas.errors import UserError


def test_a_line_cut_short_is_dropped_and_the_rest_goes_on(tmp_path, make_grid, make_line):
    grid = make_grid()
    results = Results(tmp_path)
    for number in range(3):
        results.append(make_line(grid, number))
    whole = results.path.read_bytes()
    results.path.write_bytes(whole[:-30])
    with pytest.warns(UserWarning, match="cut short"):
        again = Results(tmp_path)
    assert again.finished == set(grid.all_cells()[:2])
    again.append(make_line(grid, 2))
    assert results.path.read_bytes() == whole


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path, make_grid, make_line):
    grid = make_grid()
    Results(tmp_path).append(make_line(grid, 0))
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    again = Results(tmp_path)
    again.append(make_line(grid, 1))
    cells = [cell_of(json.loads(line)) for line in path.read_text().splitlines()]
    assert cells == grid.all_cells()[:2]


def test_damage_in_the_middle_is_refused_and_nothing_touched(tmp_path, make_grid, make_line):
    grid = make_grid()
    Results(tmp_path).append(make_line(grid, 0))
    path = tmp_path / "results.jsonl"
    damaged = b'{"model": \n' + path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"line 1 of .* cannot be read .*; remove that line"):
        Results(tmp_path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("name", "value"),
    [("value", "high"), ("n", "3"), ("low", []), ("length", 1.5), ("method", {}), ("status", None),
     ("depth", "0.5")],
)  # fmt: skip
def test_a_value_of_another_type_is_named(tmp_path, make_grid, make_line, name, value):
    line = make_line(make_grid(), 0) | {name: value}
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=rf"line 1 of .* \({name} takes .*, got .*\); remove"):
        Results(tmp_path)
    assert path.read_text() == json.dumps(line) + "\n"


@pytest.mark.parametrize(
    "other",
    [{"model": "other"}, {"seed": 7}, {"dtype": "bfloat16"}, {"lengths": (640,)},
     {"tasks": ("fidelity",)}],
)  # fmt: skip
def test_a_folder_of_another_grid_is_refused(tmp_path, make_grid, make_line, other):
    grid = make_grid()
    results = Results(tmp_path)
    results.append(make_line(grid, 0))
    results.check(grid)
    with pytest.raises(UserError, match=r"another grid .* --out"):
        results.check(make_grid(**other))


def test_a_larger_grid_goes_on_with_a_smaller_ones_cells(tmp_path, make_grid, make_line):
    results = Results(tmp_path)
    results.append(make_line(make_grid(), 0))
    results.check(make_grid(lengths=(320, 640)))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        Results(tmp_path / "file" / "out")


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, make_grid, make_line, monkeypatch):
    grid = make_grid()
    results = Results(tmp_path)
    results.append(make_line(grid, 0))
    whole = results.path.read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        results.append(make_line(grid, 1))
    assert results.path.read_bytes() == whole
    assert len(results.lines) == 1
