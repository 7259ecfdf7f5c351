"""`attlas run`: a toy is found without being named anywhere; a run is stopped and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import attlas
from attlas.catalog import registry
from attlas.catalog.table import markdown
from attlas.cli import main
from attlas.errors import UserError
from attlas.kinds.system import Example, System
from attlas.options import option


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


@pytest.fixture
def toy():
    @attlas.mechanism("toy-doubler", paper="", example={"count": 6})
    class Doubler(System):
        """Toy: learns by how much numbers are multiplied, from examples of it."""

        count: int = option("numbers", default=20, at_least=1)

        def data(self, cell, seed, split="test"):
            if cell not in self.cells:
                raise UserError(f"cell takes {self.cells}, got {cell!r}")
            rng = random.Random(f"{seed}/{split}")
            return [Example(x, 2 * x) for x in (rng.randrange(1, 1000) for _ in range(self.count))]

        def fit(self, seed, tick=lambda share: None):
            pairs = self.data("test", seed, "train")
            self.factor = torch.tensor(sum(e.target for e in pairs) / sum(e.input for e in pairs))

        def state(self):
            return {"factor": self.factor}

        def restore(self, state):
            self.factor = state["factor"]

        def predict(self, inputs):
            if not all(isinstance(x, int) for x in inputs):
                raise UserError("inputs takes whole numbers")
            return [round(x * float(self.factor)) for x in inputs]

        def guess(self, inputs, seed):
            return list(inputs)

    yield Doubler
    registry.unregister("toy-doubler")


def test_a_toy_system_is_found_without_being_named_anywhere(toy, tmp_path, capsys):
    assert cli("list", "--json", "--kind", "system", "--search", "toy-doubler") == 0
    assert json.loads(capsys.readouterr().out)["slug"] == "toy-doubler"
    assert cli("show", "toy-doubler") == 0
    assert "attlas run toy-doubler" in capsys.readouterr().out
    assert "`toy-doubler`" in markdown()
    assert {r.status for r in attlas.check("toy-doubler")} == {"passed"}
    assert cli("run", "toy-doubler(count=5)", "--seeds", "2", "--out", str(tmp_path)) == 0
    assert "100.0" in capsys.readouterr().out
    lines = [json.loads(li) for li in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(li["seed"], li["score"], li["baseline"], li["n"]) for li in lines] == [
        (0, 1.0, 0.0, 5), (1, 1.0, 0.0, 5),
    ]  # fmt: skip
    assert (tmp_path / "seed-1" / "system.safetensors").exists()
    assert cli("run", "toy-doubler(count=5)", "--seeds", "3", "--out", str(tmp_path)) == 0
    assert "2 of 3 cells are finished" in capsys.readouterr().out
    assert cli("run", "toy-doubler", "--out", str(tmp_path)) == 2
    assert "take another folder" in capsys.readouterr().err


def test_a_broken_system_fails_the_check_for_it(toy, monkeypatch):
    monkeypatch.setattr(toy, "guess", lambda self, inputs, seed: [2 * x for x in inputs])
    failed = [r.check for r in attlas.check("toy-doubler", raises=False) if r.status == "failed"]
    assert failed == ["beats-the-baseline"]
    monkeypatch.undo()
    monkeypatch.setattr(
        toy, "restore", lambda self, state: setattr(self, "factor", torch.tensor(3.0))
    )
    failed = [r.check for r in attlas.check("toy-doubler", raises=False) if r.status == "failed"]
    assert failed == ["saved-and-loaded"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("needle-treading", "did you mean 'needle-threading'"),
        ("snapkv", "unknown system 'snapkv'"),
        ("needle-threading(smaples=3)", "takes no option 'smaples'"),
        ("needle-threading(samples=0)", "samples must be at least 1"),
        ("needle-threading(samples=3", "cannot be read"),
    ],
)
def test_mistakes_end_in_one_sentence(name, said, tmp_path, capsys):
    assert cli("run", name, "--out", str(tmp_path)) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_ctrl_c_ends_within_two_seconds_and_the_run_goes_on(tmp_path, capsys):
    options = "tasks=('needle', 'threads'), lengths=(2000, 3000), samples=400, reader='solver'"
    arguments = ["run", f"needle-threading({options})", "--seeds", "25", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "attlas", *arguments],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    path: Path = tmp_path / "results.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be stopped"
    process.send_signal(signal.SIGINT)
    # Two seconds on a machine of its own; what is asked here is that it does not finish a cell first.
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    before = path.read_bytes()
    finished = before.count(b"\n")
    assert f"{finished} of 100 cells are finished" in " ".join(said.split())
    assert cli(*arguments[:2], "--seeds", "1", "--out", str(tmp_path)) == 0
    assert path.read_bytes().startswith(before)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    cells = [(line["seed"], line["cell"]) for line in lines]
    assert len(set(cells)) == len(cells)
    assert {cell for seed, cell in cells if seed == 0} >= {"needle 2000", "threads 3000"}
