"""A task of `attlas compare` is one file: the plan, the table and the report ask it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import attlas
from attlas.catalog import registry
from attlas.catalog.table import markdown
from attlas.cli import main
from attlas.compare.grid import parse_tasks
from attlas.compare.methods import comparable, parse_methods
from attlas.errors import UserError
from attlas.tasks.compare.base import FOUND, CompareTask, Context, Metric, shares
from attlas.tasks.continuation import continuation
from attlas.tasks.record import hits

ROOT = Path(__file__).parents[2]


class Long(Context):
    """A text whose cache is held against a bound."""

    name, title = "toy-text", "toy"

    def weight(self, length: int) -> float:
        return length

    def text(self, tokenizer: Any, preset: Any, length: int, depth: Any, seed: str) -> list[int]:
        return continuation(tokenizer, length, 1, seed).context

    def read(self, bench: Any, text: list[int], methods: Any) -> list[int]:
        return text

    def observe(self, bench: Any, read: list[int], method: Any, hold: Callable[[Any], int]) -> bool:
        from attlas.compare.shared import Reading

        reading = Reading.of(bench.model, read, [method])
        with reading.attached(method):
            return hold(reading.fork(method)[0]) > 50_000


@pytest.fixture
def toy():
    text = Long()

    @attlas.mechanism("toy", paper="")
    class Toy(CompareTask):
        """Toy: whether a cache holds more than 50 kB."""

        metrics = (
            Metric("large", "large %", FOUND, "higher", "caches above 50 kB", text, hits, shares,
                   scale=100.0),
        )  # fmt: skip
        how = "Toy: caches are weighed."

        def rounds(self, preset):
            return preset.contexts

        def samples(self, context, seen):
            yield "large", None, seen

    yield Toy
    registry.unregister("toy")


def test_a_toy_task_is_found_without_being_named_anywhere(
    toy, tiny_preset, folder, tmp_path, capsys
):
    arguments = ["--model", str(folder), "--preset", "tiny", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments, "--tasks", "toy"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "large %" in " ".join(shown.split())
    lines = [json.loads(li) for li in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(li["task"], li["metric"], li["status"]) for li in lines} == {("toy", "large", "ok")}
    assert {li["method"]: li["value"] for li in lines} == {
        "full": 1.0,
        "streaming-llm(keep=0.5)": 0.0,
    }
    assert "Toy: caches are weighed." in (tmp_path / "report.html").read_text("utf-8")
    assert parse_tasks([])[-1] != "toy"  # what is found comes before what it costs
    assert "toy" in parse_tasks([])
    with pytest.raises(SystemExit):
        main(["list", "--json", "--kind", "task", "--search", "toy"])
    assert json.loads(capsys.readouterr().out)["slug"] == "toy"
    assert "`toy`" in markdown()
    results = {r.check: r.status for r in attlas.check("toy")}
    assert set(results.values()) == {"passed"}
    assert {"texts-repeat", "cells-agree", "measures-finite", "described"} <= set(results)


def test_two_tasks_cannot_share_a_metrics_name(toy):
    @attlas.mechanism("toy-twin", paper="")
    class Twin(toy):
        """Twin: the toy once more."""

    try:
        with pytest.raises(UserError, match="toy and toy-twin both call a number 'large'"):
            parse_tasks([])
        assert parse_tasks(["toy-twin"]) == ("toy-twin",)
        failed = {r.check for r in attlas.check("toy-twin", raises=False) if r.status == "failed"}
        assert failed == {"cells-agree"}
    finally:
        registry.unregister("toy-twin")


def test_a_task_that_forgets_a_metric_is_found_by_its_contract(toy):
    toy.metrics = (*toy.metrics, replace(toy.metrics[0], key="small"))
    failed = {r.check for r in attlas.check("toy", raises=False) if r.status == "failed"}
    assert failed == {"measures-finite"}


def test_the_order_of_tasks_is_quality_first():
    assert parse_tasks([]) == ("needle", "fidelity", "perplexity", "memory", "speed")
    assert parse_tasks(["speed,needle"]) == ("needle", "speed")


#: What `--preset cache` compared while the plan still named the methods.
FAMILY = {
    "full", "zipcache", "qaq-quality-adaptive-quantization", "akvq-vl", "adaptive-long-context-heads",
    *(
        f"{name}(keep={keep})"
        for name in ("streaming-llm", "snapkv", "expected-attention", "observed-attention", "tova",
                     "pyramid-kv", "ada-kv", "q-filters")
        for keep in (0.5, 0.25, 0.125)
    ),
    *(f"snapkv(keep={keep}, window=64, kernel=5, pooling='avg')" for keep in (0.25, 0.125)),
    *(f"balancekv(keep={keep})" for keep in (0.5, 0.25)),
    "key-norm-eviction(keep=0.5)",
    *(f"quantized-cache(bits={bits})" for bits in (8, 4, 3, 2)),
    *(f"eigen-attention(keep={keep})" for keep in (0.75, 0.5)),
    *(
        f"{name}(keep={keep})"
        for name in ("quest-page-selection", "loki-low-rank-keys", "lrqk-low-rank-attention",
                     "recycled-attention", "delta-layer-aware-attention")
        for keep in (0.25, 0.125)
    ),
    *(f"loki-low-rank-keys(keep={keep}, rank=0.5)" for keep in (0.25, 0.125)),
    "snapkv(keep=0.5)+quantized-cache(bits=4)",
    "snapkv(keep=0.25)+quantized-cache(bits=4)",
    "quantized-cache(bits=4)+quest-page-selection(keep=0.125)",
}  # fmt: skip


def test_the_family_of_caches_is_what_its_members_declare():
    declared = comparable()
    assert declared[0] == "full"
    assert len(declared) == len(set(declared))
    # Labels are written as results name their methods, so that earlier runs go on.
    assert [method.label for method in parse_methods(declared)] == declared
    assert set(declared) >= FAMILY


def test_a_part_joins_the_family_by_its_own_file():
    @attlas.mechanism("toy-cache", paper="")
    class ToyCache(registry.find("snapkv").object):
        comparable = ("(keep=0.5)",)

    try:
        assert set(comparable()) - {"toy-cache(keep=0.5)"} >= FAMILY
        assert comparable().count("toy-cache(keep=0.5)") == 1
        assert "toy-cache(keep=0.25)" not in comparable()  # what a base declares is its own
    finally:
        registry.unregister("toy-cache")
