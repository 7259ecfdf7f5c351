"""Adapters of reference cases read all that a case tells, and cases pass without intermediates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attlas.contract.cases import Case, Check, adapter, adapters, checkout_cases, run_case
from attlas.errors import UserError
from reference.rope import rope_of

SMALL = [c for c in checkout_cases() if not c.name.startswith("model-") and "smollm2" not in c.name]
#: Intermediates without which nothing can be computed: which blocks were drawn.
NEEDED = {"bigbird-block-sparse-train": {"block_mask"}}


@pytest.fixture(scope="module", autouse=True)
def _reader() -> None:
    if "reads-little" not in adapters():
        adapter("reads-little", mechanism="softmax")(_reads_little)


def _reads_little(case: Case) -> Iterator[Check]:
    config = case.config
    case.sizes(case.inputs["x"], "batch _")
    case.states(causal=False, dropout=(0, "off"))
    case.without_effect("param.bias")
    if config.get("doubled"):
        yield case.compare("out.y", 2 * case.inputs["x"])
    else:
        yield case.compare("out.y", case.inputs["x"])


def _case(config: dict[str, Any] | None = None, **more: dict[str, torch.Tensor]) -> Case:
    x = torch.ones(2, 3)
    tensors = {"inputs": {"x": x}, "params": {}, "mids": {}, "outs": {"y": x}}
    groups = {name: {**own, **more.get(name, {})} for name, own in tensors.items()}
    return Case("reads-little", "a", {"config": config or {}}, **groups)


@pytest.mark.parametrize(
    ("config", "more", "told"),
    [
        ({"norm": "none"}, {}, "config.norm"),
        ({"doubled": False, "window": None}, {}, "config.window"),
        ({}, {"inputs": {"mask": torch.ones(2)}}, "in.mask"),
        ({}, {"params": {"norm.weight": torch.ones(2)}}, "param.norm.weight"),
        ({}, {"outs": {"state": torch.ones(2)}}, "out.state"),
    ],
)
def test_what_an_adapter_passes_over_fails_the_case_by_name(
    config: dict[str, Any], more: dict[str, Any], told: str
) -> None:
    results = run_case(_case(config, **more))
    assert [r.status for r in results] == ["passed", "failed"]
    assert results[-1].reason == f"UserError: the adapter of 'reads-little' does not read {told}"


def test_what_is_read_stated_or_without_effect_passes() -> None:
    case = _case(
        {"seed": 3, "batch": 2, "causal": False, "dropout": "off", "doubled": False},
        params={"bias": torch.ones(2)}, mids={"weights": torch.ones(2)},
    )  # fmt: skip
    for _ in range(2):  # what one run has read is not read in the next
        assert [r.status for r in run_case(case)] == ["passed"]
        assert "param.bias" in case.seen
    case.seen.clear()
    assert "config.doubled" in case.unread()
    assert case.config.get("batch") == 2
    assert "config.batch" not in case.unread()


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"causal": True}, "config 'causal' is True; the adapter takes only False"),
        ({"batch": 5}, "config 'batch' is 5; the adapter takes only 2"),
        ({"dropout": 0.1}, r"config 'dropout' is 0.1; the adapter takes only \(0, 'off'\)"),
    ],
)
def test_a_value_that_an_adapter_cannot_honour_is_refused_by_name(
    config: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        list(_reads_little(_case(config)))
    assert run_case(_case(config))[-1].status == "failed"


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_published_cases_pass_without_intermediates_and_fail_with_an_unknown_option(
    case: Case,
) -> None:
    kept = {name: case.mids[name] for name in NEEDED.get(case.name, ())}
    meta = {**case.meta, "config": {**case.meta["config"], "never_heard_of": True}}
    bare = Case(
        case.name, case.stem, meta, dict(case.inputs), dict(case.params), kept, dict(case.outs)
    )
    *results, last = run_case(bare)
    if " is not here; run `attlas fetch minilm`" in last.reason:
        pytest.skip("the case is of MiniLM, which was not fetched")
    assert results
    for result in results:
        assert result.status == "passed", f"{result.check}: {result.reason}"
    assert last.reason.endswith(f"the adapter of {case.name!r} does not read config.never_heard_of")


@pytest.mark.parametrize(
    ("told", "base", "interleaved"),
    [
        ("two halves, base 10000", 1e4, False),
        ("adjacent pairs, base 500000", 5e5, True),
        ("half-split theta 1e+6", 1e6, False),
        ("base 100", 100.0, False),
        (True, 1e4, False),
    ],
)
def test_rotations_are_read_as_cases_tell_them(
    told: object, base: float, interleaved: bool
) -> None:
    given = None if interleaved else False
    rope = rope_of(told, 8, interleaved=given)
    assert rope is not None
    torch.testing.assert_close(
        rope.frequencies, base ** -(torch.arange(4) / 4), check_dtype=False
    )  # fmt: skip
    assert rope.interleaved is interleaved
    assert rope_of(None, 8) is rope_of(False, 8) is rope_of("none", 8) is None


@pytest.mark.parametrize("told", ["yes", "adjacent halves", "interleaved pairs, base 10000"])
def test_rotations_that_a_program_has_not_are_refused(told: str) -> None:
    with pytest.raises(UserError, match="config 'rope' is"):
        rope_of(told, 8, interleaved=False)
