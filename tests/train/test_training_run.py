"""The command as a user runs it: what it writes, what it survives, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from attlas.attention import Attention
from attlas.catalog import registry
from attlas.cli import main
from attlas.supports import Supports
from attlas.train import run as running
from attlas.train.build import build
from attlas.train.measure import operations
from attlas.train.plan import Plan, parse_mechanisms, parse_task

TINY = ["--dim", "16", "--layers", "1", "--heads", "2", "--batch", "8", "--tested", "16",
        "--steps", "12", "--save", "4", "--seeds", "1", "--device", "cpu"]  # fmt: skip

SLOW = """
import os, sys, time
import torch
from attlas.cli import main
from attlas.train import checkpoint

torch.set_num_threads(1)
save = checkpoint.save
def slowly(*given):
    save(*given)
    time.sleep(60)
checkpoint.save = slowly
main(sys.argv[1:])
"""


def command(out: Path, *more: str, task: str = "recall(pairs=2, keys=4, length=8)") -> list[str]:
    return ["train", "--task", task, "--out", str(out), *TINY, *more]


def ends(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_main_job_writes_all_it_promises(tmp_path, capsys):
    asked = ["--mechanisms", "softmax,differential-transformer", "--seeds", "2"]
    ends(command(tmp_path, *asked))
    found = lines(tmp_path)
    assert [(line["mechanism"], line["seed"]) for line in found] == [
        ("softmax", 0), ("differential-transformer", 0),
        ("softmax", 1), ("differential-transformer", 1),
    ]  # fmt: skip
    for line in found:
        assert line["status"] == "ok", line["reason"]
        assert len(line["curve"]) == 12
        assert line["score_curve"][-1] == [12, line["scores"]["test"]]
        # One layer keeps keys and values of width 16 in float32: 2 · 16 · 4 bytes a token.
        assert line["cache_bytes_per_token"] == line["cache_growth"] == 2 * 16 * 4
        assert line["versions"]["torch"] == torch.__version__
    softmax, differential = found[:2]
    assert differential["operations"] > softmax["operations"] > 0
    for name in ("table.md", "curves.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 500
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "±" in (tmp_path / "table.md").read_text()
    assert not list((tmp_path / "checkpoints").iterdir())
    capsys.readouterr()
    before = (tmp_path / "results.jsonl").read_bytes()
    ends(command(tmp_path, *asked))
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert "all 4 runs are finished" in capsys.readouterr().out


def test_killed_in_the_middle_its_losses_are_those_of_an_uninterrupted_run(tmp_path):
    asked = ["--mechanisms", "softmax(dropout=0.2)"]  # random numbers in every step, too
    ends(command(tmp_path / "whole", *asked))
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SLOW, *command(out, *asked)])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(out.glob("checkpoints/*/step-00000004")):
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lines(out) == []
    drawn_again = []
    step = running.Trainer._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.Trainer, "_step",
                      lambda self, n: drawn_again.append(n) or step(self, n))  # fmt: skip
        ends(command(out, *asked))
    assert drawn_again == list(range(4, 12))  # from the checkpoint, not from the beginning
    whole, killed = lines(tmp_path / "whole")[0], lines(out)[0]
    assert killed["curve"] == whole["curve"]
    assert killed["score_curve"] == whole["score_curve"]
    assert killed["scores"] == whole["scores"]


def test_a_checkpoint_cut_short_is_passed_over(tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    class Stopping(running.Trainer):
        def save(self):
            super().save()
            if self.state["step"] == 8:
                raise Stop

    monkeypatch.setattr(running, "Trainer", Stopping)
    with pytest.raises(Stop):
        main(command(tmp_path, "--mechanisms", "softmax"))
    [folder] = (tmp_path / "checkpoints").iterdir()
    [kept] = folder.iterdir()
    (kept / "model.safetensors").write_bytes(b"\x10" * 40)
    monkeypatch.undo()
    ends(command(tmp_path, "--mechanisms", "softmax"))
    assert lines(tmp_path)[0]["status"] == "ok"
    assert len(lines(tmp_path)[0]["curve"]) == 12


def test_one_mechanism_that_fails_leaves_the_others_alone(tmp_path, toys, capsys):
    names = "toy-diverging,toy-hungry,toy-broken,softmax"
    ends(command(tmp_path, "--mechanisms", names))
    found = {line["mechanism"]: line for line in lines(tmp_path)}
    assert found["softmax"]["status"] == "ok"
    assert found["toy-diverging"]["status"] == "diverged"
    assert found["toy-diverging"]["diverged_at"] == 7
    assert len(found["toy-diverging"]["curve"]) == 6
    assert found["toy-hungry"]["status"] == "out of memory"
    assert found["toy-broken"]["status"] == "failed"
    assert "wires crossed" in found["toy-broken"]["reason"]
    for name in ("table.md", "report.html"):
        assert "diverged at step 7" in (tmp_path / name).read_text("utf-8")
    assert "wires crossed" in capsys.readouterr().out
    ToyBroken.broken = False
    ends(command(tmp_path, "--mechanisms", names))
    statuses = [(line["mechanism"], line["status"]) for line in lines(tmp_path)]
    assert statuses[4:] == [("toy-broken", "ok")]  # what failed is tried again, what ended is not


class ToyDiverging(Attention):
    def output(self, heads, inputs):
        self.passes = getattr(self, "passes", 0) + self.training
        y = super().output(heads, inputs)
        return y * torch.nan if self.passes == 7 else y


class ToyHungry(Attention):
    def output(self, heads, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class ToyBroken(Attention):
    broken = True

    def output(self, heads, inputs):
        if self.broken:
            raise RuntimeError("wires crossed")
        return super().output(heads, inputs)


class ToyAcausal(Attention):
    supports = Supports(causal=False)


@pytest.fixture
def toys():
    named = {"toy-diverging": ToyDiverging, "toy-hungry": ToyHungry, "toy-broken": ToyBroken,
             "toy-acausal": ToyAcausal}  # fmt: skip
    for name, cls in named.items():
        registry.mechanism(name, paper="")(cls)
    yield
    ToyBroken.broken = True
    for name in named:
        registry.unregister(name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mechanisms", "sofmax"], "did you mean 'softmax'"),
        (["--mechanisms", "snapkv"], "is a cache, which has no weights to train"),
        (["--mechanisms", "softmax(colour=1)"], "takes no option 'colour'"),
        (["--mechanisms", "softmax(dim=3)"], "dim is set by the model"),
        (["--mechanisms", "softmax(kv_heads=3)"], "kv_heads must divide heads=2"),
        (["--mechanisms", "toy-acausal"], "needs a decoder and it has no causal form"),
        (["--mechanisms", "ela-efficient-local"], "it is of kind 'module'; the task takes layers"),
        (["--mechanisms", "none"], "it is of kind 'none'; the task takes layers"),
        (["--mechanisms", "none(kv_heads=3)"], "none takes no options"),
        (["--task", "digits-shifted", "--dim", "8"], "norm_groups must divide channels=8"),
        (["--task", "digits-shifted", "--mechanisms", "softmax"], "the task takes modules"),
        (["--task", "digits-shifted", "--mechanisms", "ela+none"], "one mechanism for all layers"),
        (["--task", "digits-shifted", "--mechanisms", "ela(channels=3)"], "channels is set by"),
        (["--task", "digits-shifted", "--layers", "2", "--dim", "15"], "dim must be a multiple"),
        (["--task", "digits-shifted(size=7)"], "size must be at least 8 and at most 64"),
        (["--task", "recal"], "did you mean 'recall'"),
        (["--task", "recall(pears=3)"], "takes no option 'pears'"),
        (["--task", "recall(pairs=3, length=8)"], "length must be at least 9"),
        (["--task", "recall(pairs='a')"], "pairs takes int"),
        (["--batch", "9", "--accumulate", "2"], "batch must be a multiple"),
        (["--rate", "-1"], "rate must be a positive number"),
        (["--dim", "15"], "heads must divide dim=15"),
        (["--device", "abacus"], "device takes cpu"),
        (["--dtype", "float16"], "did you mean 'bfloat16'"),
        (["--out", "/proc/nowhere"], "cannot write to"),
    ],
)
def test_mistakes_end_in_one_sentence_before_anything_is_trained(
    tmp_path, toys, capsys, options, said
):
    ends(command(tmp_path, *options), code=2)
    shown = capsys.readouterr().err
    assert said in " ".join(shown.split())
    assert "Traceback" not in shown
    assert not (tmp_path / "results.jsonl").exists()


def test_a_folder_of_other_settings_is_refused_by_name(tmp_path, capsys):
    ends(command(tmp_path, "--mechanisms", "softmax"))
    before = (tmp_path / "results.jsonl").read_bytes()
    for options, said in (
        (["--rate", "0.1"], "rate 0.003, now 0.1"),
        (["--steps", "13"], "steps 12, now 13"),
        (["--task", "induction(half=4)"], "task 'recall"),
    ):
        ends(command(tmp_path, "--mechanisms", "softmax", *options), code=2)
        assert said in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "results.jsonl").read_bytes() == before
    ends(command(tmp_path, "--mechanisms", "softmax,differential-transformer"))  # more is welcome
    assert len(lines(tmp_path)) == 2


def test_accumulated_parts_make_the_same_losses(tmp_path):
    for parts in ("1", "4"):
        ends(command(tmp_path / parts, "--mechanisms", "softmax", "--accumulate", parts,
                     task="counting(length=12)"))  # fmt: skip
    whole, parts = (lines(tmp_path / n)[0]["curve"] for n in ("1", "4"))
    assert [v for _, v in parts] == pytest.approx([v for _, v in whole], rel=1e-4)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def test_two_processes_make_the_same_losses(tmp_path):
    asked = ["--mechanisms", "softmax", "--steps", "4"]
    ends(command(tmp_path / "one", *asked))
    # On CPUs without MPI `accelerate launch` starts one process; torchrun starts what it would.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
              "--master_port", str(free_port()), "-m", "attlas"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command(tmp_path / "two", *asked)], env=environment,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = lines(tmp_path / "one")[0], lines(tmp_path / "two")[0]
    assert two["processes"] == 2
    assert [v for _, v in two["curve"]] == pytest.approx([v for _, v in one["curve"]], rel=1e-4)


def test_half_precision_trains(tmp_path):
    ends(command(tmp_path, "--mechanisms", "softmax,differential-transformer",
                 "--dtype", "bfloat16"))  # fmt: skip
    assert {line["status"] for line in lines(tmp_path)} == {"ok"}


@pytest.mark.parametrize("mechanism", ["luong-attention", "gmm-attention", "softmax"])
def test_translation_trains_the_mechanism_as_cross_attention(tmp_path, mechanism):
    ends(command(tmp_path, "--mechanisms", mechanism, "--heads", "1", task="dates"))
    (line,) = lines(tmp_path)
    assert line["status"] == "ok"


def test_a_state_of_constant_size_and_a_hybrid_are_told_by_what_tokens_add_to_their_caches(
    tmp_path,
):
    hybrid = "lightning-attention-2+softmax"
    asked = ["--mechanisms", f"lightning-attention-2,{hybrid}", "--layers", "2"]
    ends(command(tmp_path, *asked))
    recurrent, mixed = lines(tmp_path)
    assert recurrent["status"] == mixed["status"] == "ok", (recurrent["reason"], mixed["reason"])
    assert recurrent["cache_growth"] == 0 < recurrent["cache_bytes_per_token"]
    assert mixed["cache_growth"] == 2 * 16 * 4  # of the one softmax layer


def test_modules_are_trained_in_the_same_network_as_none(tmp_path):
    asked = ["--mechanisms", "none,ela-efficient-local(norm_groups=4)"]
    ends(command(tmp_path, *asked, task="digits-shifted"))
    bare, ela = lines(tmp_path)
    assert [line["status"] for line in (bare, ela)] == ["ok", "ok"]
    assert ela["parameters"] - bare["parameters"] == 7 * 16 + 2 * 16
    assert bare["cache_bytes_per_token"] is None


@pytest.mark.parametrize(
    ("task", "label"),
    [("extrapolation", "titans-memory-as-gate(window=4, memory={'chunk': 4})"),
     ("extrapolation", "titans-memory-as-context(segment=4, memory={'chunk': 4, 'kernel': 1})"),
     ("burgers(points=4)", "galerkin-attention(coordinates=1)")],
)  # fmt: skip
def test_operations_of_any_layer_are_counted(task: str, label: str) -> None:
    plan = Plan(
        task=parse_task(task)[0], mechanisms=parse_mechanisms([label]), seeds=1, steps=1, batch=1,
        accumulate=1, rate=1e-3, dim=8, layers=1, heads=2, tested=1, save=1, device="cpu",
        dtype="float32",
    )  # fmt: skip
    made = plan.made_task()
    assert operations(build(made, plan.mechanisms[0], plan, 0), made) > 0
