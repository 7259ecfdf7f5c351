"""Every registered mechanism signs the contract, and what is broken does not pass it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import attlas
from attlas.catalog import registry
from attlas.catalog.kinds import LAYER
from attlas.contract import ContractError, Result, run
from attlas.contract.measure import CHECKS, poisoned, subject_of

spec = importlib.util.spec_from_file_location("contract_toys", Path(__file__).with_name("toys.py"))
assert spec is not None
assert spec.loader is not None
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)

#: How many checks run on each mechanism; on a machine with an accelerator `devices` comes on top.
PINNED = {
    "actqkv-probe-query": 7,
    "ada-kv": 10,
    "adaptive-filter-attention": 32,
    "adaptive-long-context-heads": 8,
    "affine-scaled-attention": 32,
    "agent-attention": 27,
    "akvq-vl": 8,
    "alibi": 31,
    "arwkv-rwkv7": 31,
    "balancekv": 7,
    "bayesian-attention-mechanism": 31,
    "bigbird-mask": 6,
    "castle-lookahead-keys": 31,
    "cog-attention": 31,
    "collinear-constrained-attention": 31,
    "column-sums": 7,
    "complexformer": 32,
    "compressed-convolutional": 30,
    "contextual-position-encoding": 32,
    "coulgat": 27,
    "delta-correction": 4,
    "delta-layer-aware-attention": 8,
    "diff-mamba": 30,
    "differential-transformer": 31,
    "dint-transformer": 31,
    "dual-attention": 32,
    "duo-attention": 7,
    "dynamic-convolution-attention": 27,
    "dynamic-gqa": 29,
    "efficient-attention": 28,
    "efficient-qk-attention": 31,
    "eigen-attention": 8,
    "entropy": 7,
    "error-free-linear-attention": 31,
    "expected-attention": 10,
    "factored-attention": 31,
    "fast-weight-delta-rule": 32,
    "fastmax": 32,
    "flowformer": 32,
    "focused-linear-attention": 27,
    "fourier-attention": 28,
    "galerkin-attention": 28,
    "galerkin-linear-attention": 28,
    "gate-norm": 11,
    "gated-linear-attention": 31,
    "gmm-attention": 27,
    "grouped-query-attention": 32,
    "gui-kv": 10,
    "head-embedding-mha": 32,
    "headmask": 32,
    "hedgehog": 32,
    "hyper-attention": 32,
    "kdeformer": 29,
    "key-driven-gqa": 29,
    "key-norm-eviction": 10,
    "kv-transformer": 31,
    "l2vit": 27,
    "latte": 32,
    "length-scaled-softplus-attention": 32,
    "lightning-attention-2": 31,
    "linear-attention": 32,
    "linear-log-normal-attention": 31,
    "linformer": 29,
    "local-linear-attention": 32,
    "loki-low-rank-keys": 8,
    "long-short-attention": 31,
    "longheads": 6,
    "lrqk-low-rank-attention": 8,
    "luong-attention": 27,
    "magnitude-aware-linear-attention": 27,
    "max-pooling": 30,
    "mean-distance": 7,
    "mega": 29,
    "mega-chunk": 30,
    "memory-efficient-attention": 8,
    "mfa-key-reuse": 31,
    "minimal-transformer": 31,
    "mixture-of-head": 32,
    "multi-head-latent-attention": 30,
    "multi-matrix-factorization": 31,
    "multi-query-attention": 31,
    "multi-token-attention": 32,
    "nalaformer": 27,
    "neural-attention": 31,
    "nexus-higher-order": 31,
    "normalized-attention": 31,
    "observed-attention": 10,
    "optimised-attention": 31,
    "perturbed-gqa": 29,
    "probabilistic-attention": 29,
    "pyramid-kv": 10,
    "q-filters": 10,
    "qaq-quality-adaptive-quantization": 7,
    "qk-norm": 31,
    "quantized-cache": 8,
    "quest-page-selection": 8,
    "rank-augmented-linear-attention": 28,
    "recycled-attention": 8,
    "regla": 31,
    "retention": 31,
    "rope-nope-hybrid": 31,
    "selective-self-attention": 32,
    "shared-diff-transformer": 32,
    "sink-mass": 7,
    "sinkformer": 28,
    "snapkv": 10,
    "softmax": 31,
    "softmax-as-rnn": 33,
    "softplus-reweighted-attention": 31,
    "sparse-prefill": 4,
    "sparse-query-attention": 32,
    "sum-pooling": 30,
    "super-attention": 31,
    "titans-memory-as-context": 31,
    "titans-memory-as-gate": 30,
    "titans-memory-as-layer": 30,
    "titans-neural-memory": 30,
    "tnl-attention": 31,
    "top-links": 7,
    "tova": 10,
    "transformer-vq": 31,
    "transnormer-llm": 31,
    "weights": 7,
    "window": 10,
    "wkvquant": 8,
    "zipcache": 8,
}


def _all() -> list[tuple[str, str]]:
    return [
        (entry.name, one.name)
        for entry in registry.entries()
        for one in run.checks_of(subject_of(entry.name))
    ]


def _one(thing: object, check: str) -> Result:
    """One check alone, since most tests here need no other."""
    subject = subject_of(thing)
    one = next(c for c in run.checks_of(subject) if c.name == check)
    return run._judged(subject, one, subject.expected_failures.get(check))


@pytest.mark.parametrize(("name", "check"), _all())
def test_signs_the_contract(name: str, check: str) -> None:
    result = _one(name, check)
    assert result.status != "failed", f"[{result.case}] {result.reason}"


@pytest.mark.parametrize("name", PINNED)
def test_no_check_vanishes(name: str) -> None:
    names = [one.name for one in run.checks_of(subject_of(name)) if one.name != "devices"]
    assert len(names) == len(set(names)) == PINNED[name], sorted(names)


def test_number_of_checks_is_pinned(capsys: pytest.CaptureFixture[str]) -> None:
    families = ("layer", "op", "mask", "part", "adapter")
    count = {family: sum(c.family == family for c in CHECKS) for family in families}
    with capsys.disabled():
        print(f"\ncontract: {count}, {len(_all())} checks over {len(registry.entries())} mechanisms")
    assert {e.name for e in registry.entries(LAYER)} <= set(PINNED)
    assert count == {"layer": 34, "op": 8, "mask": 6, "part": 11, "adapter": 11}


@pytest.mark.parametrize("toy", toys.BROKEN, ids=lambda toy: toy.__name__)
def test_a_broken_mechanism_fails_the_check_for_it(toy: type) -> None:
    result = _one(toy, toys.BROKEN[toy])
    assert result.status == "failed"
    assert result.reason
    assert _one(toys.Good, toys.BROKEN[toy]).status == "passed"


def test_a_good_unregistered_mechanism_passes() -> None:
    results = attlas.check(toys.Good)
    assert {result.status for result in results} == {"passed"}
    assert {result.name for result in results} == {"Good"}
    assert subject_of(toys.Good(16, 2)) == subject_of(toys.Good)


def test_failures_are_raised_together(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [c for c in CHECKS if c.name in ("causality", "decoding", "shapes") and c.family == "layer"]
    monkeypatch.setattr(run, "checks_of", lambda subject: few)
    with pytest.raises(ContractError, match="causality") as caught:
        attlas.check(toys.Leaks)
    assert [failure.check for failure in caught.value.failures] == ["causality", "decoding"]
    assert isinstance(caught.value, AssertionError)


def test_expected_failures_are_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [one for one in CHECKS if one.name in ("shapes", "gradients-reach")]
    monkeypatch.setattr(run, "checks_of", lambda subject: [c for c in few if c.family == "layer"])
    reason = "the paper's own layer has it"
    monkeypatch.setattr(
        toys.HasADeadParameter, "expected_failures", {"gradients-reach": reason}, raising=False
    )
    by_check = {r.check: r for r in attlas.check(toys.HasADeadParameter, raises=False)}
    assert by_check["gradients-reach"].status == "expected failure"
    assert by_check["gradients-reach"].reason == reason
    monkeypatch.setattr(
        toys.Good, "expected_failures", {"shapes": "?", "no-such-check": "?"}, raising=False
    )
    results = {r.check: r for r in attlas.check(toys.Good, raises=False)}
    assert results["shapes"].status == "failed"
    assert "expected to fail" in results["shapes"].reason
    assert results["no-such-check"].status == "failed"


def test_check_refuses_what_is_no_mechanism() -> None:
    with pytest.raises(TypeError, match="registered mechanism"):
        attlas.check(3)
    with pytest.raises(ValueError, match="did you mean 'qk-norm'"):
        attlas.check("qk-nrom")


def test_poisoned_memory_reads_as_nan_and_only_inside() -> None:
    before = torch.empty
    with poisoned():
        made = [
            torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(2).new_empty(3),
            torch.empty_strided((3,), (1,)), torch.ones(1).new_empty_strided((3,), (1,)),
        ]  # fmt: skip
        assert all(bool(t.isnan().all()) for t in made)
        torch.empty(3, dtype=torch.long)
    assert torch.empty is before
    assert not torch.zeros(3).isnan().any()


def test_a_registered_toy_is_checked_by_name() -> None:
    try:
        attlas.mechanism("toy-of-this-test", paper="")(toys.Good)
        assert _one("toy-of-this-test", "shapes").status == "passed"
        # It says neither its cost nor its source: that is asked of what is registered.
        assert _one("toy-of-this-test", "described").status == "failed"
    finally:
        registry.unregister("toy-of-this-test")


def test_attach_is_a_function_also_once_its_package_is_imported() -> None:
    import attlas.attach as package

    assert callable(attlas.attach)
    assert attlas.attach.Part is package.Part
    with pytest.raises(TypeError, match="Transformers model"):
        attlas.attach(torch.nn.Linear(2, 2))
