"""Every registered mechanism signs the contract, and what is broken does not pass it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jaxtyping
import pytest
import torch

import attlas
from attlas.catalog import registry
from attlas.contract import ContractError, Result, pins, run
from attlas.contract.measure import CHECKS, poisoned, subject_of

spec = importlib.util.spec_from_file_location("contract_toys", Path(__file__).with_name("toys.py"))
assert spec is not None
assert spec.loader is not None
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)

PAPERS = Path(__file__).parents[1] / "papers"
PINNED = pins.read(PAPERS)
NAMES = [entry.name for entry in registry.entries()]


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


#: Checks in which shapes are checked too, at three times their cost; the others call what these call.
SHAPED = ("shapes", "decoding", "padding", "recorded", "decodes-as-it-reads", "saved-and-loaded")


@pytest.mark.parametrize(("name", "check"), _all())
def test_signs_the_contract(name: str, check: str) -> None:
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", before or check not in SHAPED)
    try:
        result = _one(name, check)
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
    assert result.status != "failed", f"[{result.case}] {result.reason}"


@pytest.mark.parametrize("name", NAMES)
def test_no_check_vanishes(name: str) -> None:
    names = [one.name for one in pins.pinned_checks(name)]
    assert len(names) == len(set(names)), sorted(names)
    assert len(names) == PINNED.get(name), f"{sorted(names)}; `make pins` pins what runs now"


def test_pins_are_of_what_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(PINNED) == set(NAMES)
    count = pins.families()
    with capsys.disabled():
        print(f"\ncontract: {count}, {sum(PINNED.values())} checks over {len(NAMES)} mechanisms")
    assert count == pins.read_families(PAPERS)


def test_pins_are_written_and_stale_ones_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pins, "counts", lambda: {"snapkv": {"tova": 2, "snapkv": 1}})
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "pins.json").write_text('{"gone": 3}')
    pins.write(tmp_path)
    assert pins.read(tmp_path) == {"snapkv": 1, "tova": 2}
    assert pins.read_families(tmp_path) == pins.families()
    with pytest.raises(ValueError, match="not a folder"):
        pins.write(tmp_path / "none")


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
    of_layers = ("network", "layer")
    few = [one for one in CHECKS if one.name in ("shapes", "gradients-reach")]
    monkeypatch.setattr(run, "checks_of", lambda subject: [c for c in few if c.family in of_layers])
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
