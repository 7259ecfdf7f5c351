"""A toy study is found everywhere; the runner goes on, fails alone and keeps what is finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

import attlas
from attlas.catalog import registry
from attlas.catalog.papers import paper
from attlas.catalog.table import markdown
from attlas.cli import main
from attlas.kinds.claim import Claim
from attlas.kinds.expect import Beats, NoWorse, Row, Within, verdict
from attlas.kinds.study import Study
from attlas.options import Configured, option
from attlas.study.find import chosen, claims, studies
from attlas.study.page import page
from attlas.study.record import rows_of

ROOT = Path(__file__).parents[2]


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


@pytest.fixture
def toy():
    @attlas.mechanism("toy-study", paper="", example={"size": 2})
    class Toy(Study):
        """Toy: noise around two means."""

        claim = "two is more than one, by $1"
        set_up = "numbers with noise"
        expects = (Beats("two", "one"), Within("two", least=0.0))
        broken = ()
        runs = ()

        size: int = option("how many numbers", default=10, at_least=1)

        def run(self, seed):
            type(self).runs += (seed,)
            if seed in self.broken:
                raise RuntimeError("broken on purpose")
            for name, mean in (("one", 1.0), ("two", 2.0)):
                yield Row(name, mean + 0.1 * torch.rand(self.size).mean(), "apples")
                yield Row(f"{name} by size", mean, "apples", at=float(self.size))

    yield Toy
    registry.unregister("toy-study")


# The room ------------------------------------------------------------------------------------------


def test_a_toy_study_is_found_without_being_named_anywhere(toy, capsys, tmp_path):
    assert cli("list", "--json", "--search", "toy-study") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "study"
    assert cli("show", "toy-study") == 0
    assert "attlas study toy-study" in capsys.readouterr().out
    assert "`toy-study`" in markdown()
    assert paper("toy-study").kind == "study"
    assert {r.status for r in attlas.check("toy-study")} == {"passed"}
    assert cli("study", "--list") == 0
    assert "toy-study" in capsys.readouterr().out
    assert cli("study", "toy-study", "--out", str(tmp_path)) == 0
    assert "holds" in capsys.readouterr().out
    record = json.loads((tmp_path / "toy-study.json").read_text())
    assert record["verdict"] == "holds"
    assert [n["seeds"] for n in record["numbers"]] == [3] * 4
    assert (tmp_path / "toy-study.png").read_bytes().startswith(b"\x89PNG")
    assert "**holds**" in page(tmp_path)


@pytest.mark.parametrize(("check", "broken"), [
    ("repeats", {"run": lambda self, seed: [Row("one", time.perf_counter()), Row("two", 3.0)]}),
    ("repeats", {"run": lambda self, seed: [Row("one", 1.0), Row("two", 3.0)]}),
    ("repeats", {"deterministic": True}),
    ("verdict-follows", {"verdict": lambda self, rows: "holds"}),
    ("verdict-follows", {"verdict": lambda self, rows: "perhaps"}),
    ("rows-tell", {"run": lambda self, seed: [Row("one", float("nan")), Row("two", 3.0)]}),
    ("rows-tell", {"run": lambda self, seed: [Row("one", 1.0, None), Row("two", 3.0, None)]}),
    ("described", {"claim": " "}),
    ("wrong-options", {"__init__": lambda self, **options: Configured.__init__(self)}),
])  # fmt: skip
def test_a_broken_study_does_not_pass(toy, check, broken):
    cls = type("Broken", (toy,), {"__doc__": "Broken.", **broken})
    failed = {r.check for r in attlas.check(cls, raises=False) if r.status == "failed"}
    assert check in failed


def test_a_picture_that_cuts_a_text_or_stays_open_does_not_pass(toy):
    import matplotlib.pyplot as plt

    def cut(self, rows):
        figure = Study.picture(self, rows)
        figure.text(0.99, 0.5, "runs over the edge")
        return figure

    def left_open(self, rows):
        return plt.figure()

    for picture in (cut, left_open):
        cls = type("Broken", (toy,), {"picture": picture})
        failed = [r.check for r in attlas.check(cls, raises=False) if r.status == "failed"]
        assert "picture-draws" in failed
    plt.close("all")


# The rule ------------------------------------------------------------------------------------------


def rows(name, *values, better="higher"):
    return [Row(name, value, "", better) for value in values]


def test_better_by_two_standard_errors_is_clearly_better():
    one = Beats("ours", "theirs")
    assert one.answer(rows("ours", 3, 3.1) + rows("theirs", 1, 1.1)) == "yes"
    assert one.answer(rows("ours", 1, 3) + rows("theirs", 1, 2)) == "some"
    assert one.answer(rows("ours", 1, 1) + rows("theirs", 1, 1)) == "no"
    lower = rows("ours", 1, better="lower") + rows("theirs", 2, better="lower")
    assert one.answer(lower) == "yes"
    with pytest.raises(ValueError, match="'theirs'"):
        one.answer(rows("ours", 1))


def test_margins_and_bounds():
    close = rows("ours", 0.985) + rows("theirs", 1.0)
    assert NoWorse("ours", "theirs", 0.02).answer(close) == "yes"
    assert NoWorse("ours", "theirs", 0.01).answer(close) == "no"
    assert Within("x", most=1.0).answer(rows("x", 0.5, 1.0)) == "yes"
    assert Within("x", most=1.0).answer(rows("x", 0.5, 1.2)) == "some"
    assert Within("x", least=1.0).answer(rows("x", 0.5, 1.2)) == "no"


def test_the_first_expectation_decides():
    assert verdict(["yes", "yes"]) == "holds"
    assert verdict(["yes", "no"]) == verdict(["some", "yes"]) == "partly"
    assert verdict(["no", "yes"]) == "does not hold here"


# Claims --------------------------------------------------------------------------------------------

COMMITTED = sorted((ROOT / "benchmarks" / "claims").glob("*.json"))
TIMED = ("agent-attention", "hyper-attention", "kdeformer", "lightning-attention-2", "linformer",
         "sparse-query-attention")  # fmt: skip


@pytest.fixture(scope="module")
def known():
    return {**studies(), **claims()}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_verdicts_follow_from_committed_rows(path, known, monkeypatch):
    """Costs are judged by their own script; every other record has its study, and its verdict."""
    record = json.loads(path.read_text())
    if path.stem in TIMED:
        assert path.stem not in known
        assert "benchmarks/" in record["command"]
        return
    if script := re.search(r"benchmarks/(claims_\w+)\.py", record["command"]):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        claim, expects = import_module(script[1]).claimed(path.stem)
        rows = rows_of(record)
        assert verdict([one.answer(rows) for one in expects]) == record["verdict"]
        assert claim == record["claim"]
        return
    study = known[path.stem]
    assert study.verdict(rows_of(record)) == record["verdict"]
    assert (study.claim, study.set_up) == (record["claim"], record["set_up"])


def test_a_claim_trains_what_attlas_train_trains(tmp_path):
    claim = Claim("sorts", task="sorting(count=3, numbers=6)", ours="kv-transformer", steps=2, batch=128,
                  dim=16, heads=2, layers=1)  # fmt: skip
    ours = {row.name: row.value for row in claim.rows(1)}
    arguments = ["--task", claim.task, "--mechanisms", "softmax,kv-transformer", "--steps", "2",
                 "--batch", "128", "--dim", "16", "--heads", "2", "--layers", "1", "--seeds", "2",
                 "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    assert cli("train", *arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    trained = {x["mechanism"]: next(iter(x["scores"].values())) for x in lines if x["seed"] == 1}
    assert ours == trained
    assert claim.rows(1) == claim.rows(1)


def test_two_claims_of_one_mechanism_are_told_apart(known):
    assert isinstance(known["dint-transformer-noise"], Claim)
    assert not isinstance(known["dint-transformer-rows"], Claim)
    assert len(chosen(["claims"])) == len(claims()) >= 22


# The runner ----------------------------------------------------------------------------------------


def test_finished_seeds_are_not_run_again_and_others_are_added(toy, tmp_path):
    assert cli("study", "toy-study", "--seeds", "2", "--out", str(tmp_path)) == 0
    assert cli("study", "toy-study", "--seeds", "3", "--out", str(tmp_path)) == 0
    assert toy.runs == (0, 1, 2)
    assert cli("study", "toy-study(size=4)", "--seeds", "1", "--out", str(tmp_path)) == 0
    assert toy.runs == (0, 1, 2, 0)
    assert len(list(tmp_path.glob("toy-study*.json"))) == 2


def test_a_failing_seed_stops_no_other_and_is_tried_again(toy, tmp_path, capsys):
    toy.broken = (1,)
    names = ["toy-study", "dint-transformer-rows(dim=16, length=4)"]
    assert cli("study", *names, "--out", str(tmp_path)) == 1
    told = capsys.readouterr().out
    assert "broken on purpose" in told
    assert "not tried" in told
    assert not (tmp_path / "toy-study.json").exists()
    assert len(list(tmp_path.glob("dint-transformer-rows*.json"))) == 1
    toy.broken = ()
    assert cli("study", "toy-study", "--out", str(tmp_path)) == 0
    assert toy.runs == (0, 1, 2, 1)


@pytest.mark.parametrize(("arguments", "told"), [
    ([], "--list"), (["toy-stduy"], "toy-study"), (["toy-study(sise=3)"], "sise"),
    (["toy-study(size=0)"], "size"), (["toy-study(size='a')"], "size"),
    (["cog-attention(margin=1)"], "margin"), (["dint-transformer-rows", "--device", "cuda"], "device"),
    (["toy-study", "--device", "tpu"], "device"),
])  # fmt: skip
def test_wrong_words_end_in_one_sentence(toy, tmp_path, capsys, arguments, told):
    assert cli("study", *arguments, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


SLOW = """
import sys, time
import attlas
from attlas.kinds.study import Beats, Row, Study
from attlas.cli import main

@attlas.mechanism("slow", paper="")
class Slow(Study):
    claim = set_up = "slow"
    expects = (Beats("x", "x"),)
    def run(self, seed):
        if seed:
            time.sleep(60)
        yield Row("x", 1.0)

main(["study", "slow", "--out", sys.argv[1]])
"""


def test_ctrl_c_ends_within_two_seconds_and_keeps_finished_seeds(tmp_path):
    told = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    journal = tmp_path / "results.jsonl"
    for _ in range(1200):
        if journal.exists() and journal.read_text().endswith("\n"):
            break
        time.sleep(0.1)
    began, busy = time.monotonic(), max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    told.send_signal(signal.SIGINT)
    out, _ = told.communicate(timeout=60)
    assert time.monotonic() - began < 2 * busy  # where others want the processor, as much later
    assert told.returncode == 130
    assert "finished seeds are kept" in " ".join(out.split())
    assert [json.loads(line)["seed"] for line in journal.read_text().splitlines()] == [0]
