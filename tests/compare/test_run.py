from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import attlas
from attlas.attach import Part
from attlas.catalog import registry
from attlas.catalog.kinds import STEER
from attlas.cli import main
from attlas.compare import units
from attlas.compare.results import cell_of

TESTS = Path(__file__).parent.parent

SCRIPT = """
import sys, time
import torch
from attlas.cli import main
from attlas.compare import run
from attlas.compare.grid import PRESETS
from conftest import TINY

torch.set_num_threads(1)
PRESETS["tiny"] = TINY
append = run.Results.append
def slowly(self, line):
    append(self, line)
    time.sleep(0.15)
run.Results.append = slowly
main(sys.argv[1:])
"""


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return ["compare", "--model", str(folder), "--preset", "tiny", "--out", str(out), *more]


def test_the_main_job_writes_all_it_promises(tiny_preset, folder, tmp_path, capsys):
    main_ends(command(folder, tmp_path))
    found = lines(tmp_path)
    asked = {"model", "method", "task", "length", "depth", "metric", "value", "n", "seconds",
             "kv_bytes", "seed", "versions", "machine", "status"}  # fmt: skip
    assert all(asked <= set(line) for line in found)
    assert {line["status"] for line in found} == {"ok"}
    full = {line["metric"]: line for line in found if line["method"] == "full"}
    half = {line["metric"]: line for line in found if line["method"] != "full"}
    assert full["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert full["top1"]["value"] == 1.0
    assert half["cache_bytes"]["value"] < 0.6 * full["cache_bytes"]["value"]
    assert full["decode_ms"]["floor"] > 0
    for name in ("table.md", "pareto.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 500
    assert "keep=0.5" in capsys.readouterr().out
    main_ends(command(folder, tmp_path))
    assert lines(tmp_path) == found
    assert "are finished" in capsys.readouterr().out


def test_killed_in_the_middle_it_goes_on(tiny_preset, folder, tmp_path):
    package = Path(attlas.__file__).parents[1]
    folders = (TESTS / "compare", TESTS, package)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *command(folder, tmp_path)], env=environment
    )
    path = tmp_path / "results.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= 7:
            break
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    main_ends(command(folder, tmp_path))
    assert path.read_bytes().startswith(before)
    counts = Counter(cell_of(line) for line in lines(tmp_path))
    assert set(counts.values()) == {1}
    # needle: 2 depths × (single, digits, blind, several), then kl, top1, perplexity, speed 2, memory 3
    assert len(counts) == 2 * (2 * 4 + 3 + 5)


def test_memory_that_runs_out_is_a_result(tiny_preset, folder, tmp_path, monkeypatch):
    count = units.cache_bytes

    def too_much(cache):
        if any(getattr(layer, "index", None) is not None for layer in cache.layers):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return count(cache)

    monkeypatch.setattr(units, "cache_bytes", too_much)
    main_ends(command(folder, tmp_path))
    found = lines(tmp_path)
    assert {line["status"] for line in found if line["method"] == "full"} == {"ok"}
    missing = [line for line in found if line["method"] != "full"]
    assert {line["status"] for line in missing} == {"out of memory"}
    assert {line["value"] for line in missing} == {None}
    assert "2 GiB" in missing[0]["reason"]
    assert "out of memory" in (tmp_path / "report.html").read_text("utf-8")


def test_a_part_of_a_test_is_compared(tiny_preset, folder, tmp_path):
    @registry.mechanism("toy-eraser", paper="")
    class ToyEraser(Part):
        kind = STEER

        def output(self, call, heads):
            return torch.zeros_like(heads)

    try:
        main_ends(command(folder, tmp_path, "--methods", "full,toy-eraser", "--tasks", "fidelity"))
    finally:
        registry.unregister("toy-eraser")
    kl = {line["method"]: line["value"] for line in lines(tmp_path) if line["metric"] == "kl"}
    assert kl["toy-eraser"] > kl["full"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "snapvk"], "did you mean 'snapkv'"),
        (["--tasks", "neddle"], "did you mean 'needle'"),
        (["--preset", "quik"], "did you mean 'quick'"),
        (["--dtype", "float31"], "did you mean 'float32'"),
        (["--device", "abacus"], "device takes cpu"),
        (["--lengths", "many"], "lengths takes whole numbers"),
        (["--lengths", "1000"], "ask for at most 928"),
        (["--lengths", "60"], "too short for 4 needles"),
        (["--methods", "streaming-llm(tokens=500)"], "larger than a context of 320"),
        (["--methods", "snapkv(keep=0.05)"], "keeps 16 tokens, fewer than window=32"),
        (["--model", "no-such-model"], "unknown model 'no-such-model'"),
        (["--out", "/proc/nowhere"], "cannot write to"),
    ],
)
def test_mistakes_end_in_one_sentence_and_exit_code_2(
    tiny_preset, folder, tmp_path, capsys, options, said
):
    with pytest.raises(SystemExit) as ended:
        main(command(folder, tmp_path, *options))
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert said in " ".join(shown.split())
    assert "Traceback" not in shown
    assert not (tmp_path / "results.jsonl").exists() or not lines(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_a_damaged_model_file_is_named(tiny_preset, folder, tmp_path, capsys, damage):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "model")
    weights = copy / "model.safetensors"
    weights.unlink() if damage == "missing" else weights.write_bytes(b"\x10" * 100)
    with pytest.raises(SystemExit) as ended:
        main(command(copy, tmp_path / "out"))
    assert ended.value.code == 2
    assert str(copy) in capsys.readouterr().err


def main_ends(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
