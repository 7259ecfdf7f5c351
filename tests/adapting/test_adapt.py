"""`attlas adapt`: what it writes, what it refuses, and that stopping loses nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import attlas
from attlas.adapting import loop
from attlas.adapting.texts import Texts, held_out
from attlas.catalog import registry
from attlas.cli import main
from attlas.kinds.adapter import Adapter
from attlas.models.load import load_tokenizer
from attlas.options import option
from tiny_folder import save

SMALL = ("--length", "32", "--batch", "2", "--tested", "64", "--device", "cpu")


class ToyNorm(Adapter):
    """Toy: trains the model's last norm; `at` is a step at which it is interrupted."""

    at: int = option("a step", default=-1)
    nan: bool = option("whether the loss is no number", default=False)

    def change(self, injection) -> None:
        self.norm = injection.model.base_model.norm.weight

    def trainable(self):
        return {"norm": self.norm}

    def loss(self, model, ids, progress):
        if STOPPED and round(progress * 50) == STOPPED[0]:
            STOPPED.clear()
            raise KeyboardInterrupt
        found = super().loss(model, ids, progress)
        return found * float("nan") if self.nan else found


#: The step at which the toy is interrupted, once.
STOPPED: list[int] = []


@pytest.fixture(autouse=True)
def toy():
    attlas.mechanism("toy-norm", paper="")(ToyNorm)
    yield
    STOPPED.clear()
    registry.unregister("toy-norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["adapt", *arguments])
    return ended.value.code or 0


def test_gate_norm_is_told_saved_and_merged(folder, tmp_path, capsys):
    given = (str(folder), "--with", "gate-norm(layers=1)", "--out", str(tmp_path), *SMALL)
    assert cli(*given, "--merge") == 0
    said = capsys.readouterr().out
    assert "perplexity" in said
    assert "cache kB a token" in said
    result = json.loads((tmp_path / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert after["cache_bytes_per_token"] == before["cache_bytes_per_token"] / 2
    assert after["weight_bytes"] < before["weight_bytes"]
    assert after["perplexity"] != before["perplexity"]
    assert result["losses"] == []
    assert (tmp_path / "adapter.safetensors").stat().st_size < 1024
    ids = torch.arange(3, 20)[None]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    Adapter.load(tmp_path / "adapter.safetensors", model)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits)
    assert load_tokenizer(tmp_path / "merged").vocab_size == load_tokenizer(folder).vocab_size


def test_interrupted_it_goes_on_as_if_nothing_had_been(folder, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = (str(folder), "--with", "toy-norm", *SMALL, "--steps", "50")
    assert cli(*given, "--out", str(whole)) == 0
    STOPPED.append(33)
    assert cli(*given, "--out", str(parts)) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert [p.name for p in (parts / "checkpoint").iterdir()] == ["step-00000033"]
    assert not (parts / "result.json").exists()
    assert cli(*given, "--out", str(parts)) == 0
    one, two = (json.loads((p / "result.json").read_text()) for p in (whole, parts))
    assert one == two
    ours, theirs = ((p / "adapter.safetensors").read_bytes() for p in (whole, parts))
    assert ours == theirs


def test_an_interrupted_update_falls_back_to_the_last_checkpoint(folder, tmp_path, monkeypatch):
    def broken(self, closure=None):
        if len(calls) == 24:
            raise KeyboardInterrupt
        calls.append(1)
        return step(self)

    calls: list[int] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    given = (str(folder), "--with", "toy-norm", *SMALL, "--steps", "30", "--out", str(tmp_path))
    assert cli(*given) == 130
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == [f"step-{loop.SAVE:08d}"]


def test_ctrl_c_ends_it_within_two_seconds(folder, tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import test_adapt, attlas; "
        "attlas.mechanism('toy-norm', paper='')(test_adapt.ToyNorm); "
        "from attlas.cli import main; main(sys.argv[1:])"
    )
    here = str(Path(__file__).parent)
    tests = str(Path(__file__).parents[1])
    command = [
        sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r}); {program}", here,
        "adapt", str(folder), "--with", "toy-norm", "--steps", "100000", "--out", str(tmp_path),
        *SMALL,
    ]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        said = child.communicate(timeout=60)[0]
        spent = time.monotonic() - start
    finally:
        child.kill()
    assert child.returncode == 130
    assert "the same command goes on" in said
    assert list((tmp_path / "checkpoint").glob("step-*"))
    assert spent < 20  # 2 s on an idle machine; tests may run beside ten others


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--with", "gate-nrom"), "gate-norm"),
        (("--with", "gate-norm"), "layers"),
        (("--with", "gate-norm(layer=3)"), "layers"),
        (("--with", "gate-norm(layers=2)"), "at least one"),
        (("--with", "snapkv"), "adapter"),
        (("--with", "gate-norm(layers=1)", "--steps", "3"), "--steps"),
        (("--with", "gate-norm(layers=1)", "--text", __file__), "--text"),
        (("--with", "toy-norm", "--text", "nowhere.txt"), "nowhere.txt"),
        (("--with", "toy-norm", "--rate", "0"), "rate"),
        (("--with", "toy-norm", "--tested", "99999999"), "tested"),
        (("--with", "toy-norm", "--device", "cuda:77"), "cuda:77"),
        (("--with", "toy-norm(nan=True)", "--steps", "3"), "--rate"),
    ],
)
def test_refused_in_one_sentence(options, named, folder, tmp_path, capsys):
    assert cli(str(folder), "--out", str(tmp_path / "out"), *SMALL, *options) == 2
    *_, said = capsys.readouterr().err.splitlines()  # Transformers' bar comes before it
    assert said.startswith("attlas: ")
    assert named in said


def test_a_folder_of_another_run_is_refused(folder, tmp_path, capsys):
    given = (str(folder), "--out", str(tmp_path), *SMALL)
    assert cli(*given, "--with", "gate-norm(layers=1)") == 0
    assert cli(*given, "--with", "gate-norm(layers=0)") == 2
    assert "another folder with --out" in capsys.readouterr().err


def test_a_text_too_short_is_refused(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("short")
    text = ("--text", str(tmp_path / "text.txt"))
    assert cli(str(folder), "--with", "toy-norm", "--out", str(tmp_path / "o"), *SMALL, *text) == 2
    assert "too few" in capsys.readouterr().err


def test_nothing_held_out_is_trained_on(folder):
    from attlas.adapting.texts import _border
    from attlas.tasks.text import shakespeare

    tokenizer = load_tokenizer(folder)
    texts, whole = Texts(tokenizer, None, 32), shakespeare()
    assert whole.startswith(texts.text)
    assert len(texts.text) == _border(whole) < 0.91 * len(whole)
    pieces = [tokenizer.decode(ids[0]) for ids in held_out(tokenizer, 256, 32)]
    assert len(pieces) == 8
    assert all(piece in whole[_border(whole) :] for piece in pieces)
