"""The base class of modules for feature maps, and that their contract finds what is wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import attlas
import attlas.errors
from attlas.catalog import registry
from attlas.catalog.kinds import MODULE
from attlas.contract import run
from attlas.contract.measure import subject_of
from attlas.kinds.feature_map import FeatureMap

spec = importlib.util.spec_from_file_location(
    "feature_map_toys", Path(__file__).with_name("toys_feature_map.py")
)
assert spec is not None
assert spec.loader is not None
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)


def status(toy: type, name: str) -> str:
    subject = subject_of(toy)
    (one,) = [check for check in run.checks_of(subject) if check.name == name]
    return run._judged(subject, one, None).status


@pytest.mark.parametrize("toy", toys.BROKEN, ids=lambda toy: toy.__name__)
def test_what_is_broken_fails_the_check_for_it(toy):
    assert status(toy, toys.BROKEN[toy]) == "failed"


@pytest.mark.parametrize("toy", [toys.Good, toys.ReadsEarlier], ids=lambda toy: toy.__name__)
def test_what_is_not_broken_passes_all_checks(toy):
    assert {result.status for result in attlas.check(toy)} == {"passed"}


def test_sizes_are_refused_by_name():
    module = toys.ReadsEarlier(4, previous=(3,))
    x, earlier = torch.randn(2, 4, 6, 6), [torch.randn(2, 3, 9, 9)]
    assert module(x, earlier).shape == x.shape
    for wrong, maps, said in (
        (x[:, :3], earlier, "channels=4"),
        (x[:, :, :2], earlier, "at least 4"),
        (x[:, :, :5], earlier, "multiples of 2"),
        (x, [], r"previous must be 1 maps of \[3\]"),
        (x, [t[:1] for t in earlier], "previous"),
        (x, [x], "previous"),
    ):
        with pytest.raises(ValueError, match=said):
            module(wrong, maps)
    with pytest.raises(ValueError, match="reads no earlier maps"):
        toys.Good(4, previous=[3])
    with pytest.raises(ValueError, match="previous must be left out"):
        toys.Good(4)(x, earlier)
    assert [module.side(n) for n in (1, 4, 5)] == [4, 4, 6]


def test_without_a_gate_says_so():
    class Same(FeatureMap):
        """Changes nothing."""

        def mix(self, x, previous=()):
            return x

    with pytest.raises(NotImplementedError, match="Same has no weights"):
        Same(4).gate(torch.randn(1, 4, 2, 2))


def test_modules_are_listed_with_how_to_run_them():
    entry = registry.find("ela-efficient-local", MODULE)
    assert entry.file == "attlas/modules/ela.py"
    assert "digits-shifted" in entry.kind.run
    with pytest.raises(attlas.errors.UnknownName, match="module"):
        registry.find("softmax", MODULE)
