"""Kinds are declared: a toy of each is found everywhere, and an object of none, or of two, is refused."""

from __future__ import annotations

import json

import pytest
import torch

import attlas
from attlas.attach import Part, Patch, Recorder, Selector, Steerer
from attlas.cache.policy import CachePolicy
from attlas.catalog import registry
from attlas.catalog.kinds import KINDS, MASK, OP, PARTS, kind_of
from attlas.catalog.registry import Entry
from attlas.catalog.source import declared
from attlas.catalog.table import markdown
from attlas.cli import main
from attlas.contract import run
from attlas.contract.measure import subject_of
from attlas.kinds.adapter import Adapter
from attlas.kinds.analysis import Analysis
from attlas.kinds.feature_map import FeatureMap
from attlas.kinds.study import Study
from attlas.kinds.system import System
from attlas.positions import Position
from attlas.tasks.compare.base import CompareTask
from attlas.tasks.train.base import Task


class ToyLayer(attlas.Attention):
    """A toy."""


def toy_op(q, k, v):
    """A toy."""
    return v


def toy_mask(size: int = 3) -> attlas.masks.Mask:
    """A toy."""
    return attlas.masks.window(size)


class ToyPosition(Position):
    """A toy."""


class ToyCache(CachePolicy):
    """A toy."""


class ToySelect(Selector):
    """A toy."""


class ToyRecord(Recorder):
    """A toy."""


class ToySteer(Steerer):
    """A toy."""


class ToyPatch(Patch):
    """A toy."""


class ToyModule(FeatureMap):
    """A toy."""


class ToyAdapter(Adapter):
    """A toy."""


class ToyStudy(Study):
    """A toy."""

    claim = "toys are claims"


class ToySystem(System):
    """A toy."""


class ToyAnalysis(Analysis):
    """A toy."""


class ToyTask(Task):
    """A toy."""


class ToyCompareTask(CompareTask):
    """A toy."""


TOYS = {
    "layer": ToyLayer, "op": toy_op, "mask": toy_mask, "position": ToyPosition, "cache": ToyCache,
    "select": ToySelect, "record": ToyRecord, "steer": ToySteer, "patch": ToyPatch,
    "module": ToyModule, "adapter": ToyAdapter, "study": ToyStudy, "system": ToySystem, "task": ToyTask,
    "analysis": ToyAnalysis,
}  # fmt: skip
GIVEN = {"op": OP, "mask": MASK}


@pytest.fixture
def toys():
    for name, toy in TOYS.items():
        attlas.mechanism(f"toy-{name}", paper="", kind=GIVEN.get(name))(toy)
    yield
    for name in TOYS:
        registry.unregister(f"toy-{name}")


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


def test_there_is_a_toy_of_every_kind():
    assert set(TOYS) == {kind.name for kind in KINDS}
    assert kind_of(ToyCompareTask).name == "task"


def test_a_toy_of_every_kind_is_found_without_being_named_anywhere(toys, capsys):
    assert cli("list", "--json", "--search", "toy-") == 0
    rows = {row["slug"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    table = markdown()
    for name in TOYS:
        assert rows[f"toy-{name}"]["kind"] == name
        assert f"| `toy-{name}` |" in table
        assert cli("show", f"toy-{name}") == 0
        kind = registry.find(f"toy-{name}").kind
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert kind.run.replace("NAME", f"toy-{name}").split("(")[0] in shown
        checks = run.checks_of(subject_of(f"toy-{name}"))
        assert "described" in {one.name for one in checks}
        assert {one.family for one in checks} <= set(kind.signs)


@pytest.mark.parametrize("name", [k.name for k in PARTS])
def test_parts_sign_the_checks_of_parts(toys, name):
    families = {one.family for one in run.checks_of(subject_of(f"toy-{name}"))}
    assert "part" in families


def test_an_object_of_no_kind_is_refused():
    for thing in (torch.nn.Linear, Part, lambda q: q):
        with pytest.raises(TypeError, match="of no kind: derive it from a base class"):
            attlas.mechanism("toy", paper="")(thing)
    with pytest.raises(TypeError, match="class of a kind of attlas"):
        attlas.check(torch.nn.Linear)


def test_an_object_of_two_kinds_is_refused():
    class Both(Recorder, Steerer):
        """Looks and steers."""

    for thing, given in ((Both, None), (ToyLayer, MASK)):
        with pytest.raises(TypeError, match=r"of two kinds, \w+ and \w+; give it one"):
            attlas.mechanism("toy", paper="", kind=given)(thing)


def test_an_object_in_the_room_of_another_kind_is_refused():
    stray = type("Stray", (ToyLayer,), {"__module__": "attlas.masks.stray"})
    with pytest.raises(TypeError, match=r"is no room for it; move it to .*attlas\.layers"):
        attlas.mechanism("toy", paper="")(stray)


def test_a_taken_name_is_refused_before_and_after_it_is_imported():
    for name in ("snapkv", "kivi"):  # a name and an alias
        with pytest.raises(ValueError, match=f"{name}.*is taken by attlas.parts"):
            attlas.mechanism(name, paper="")(ToyLayer)


def test_what_is_read_off_the_sources_is_what_is_registered():
    for one in declared():
        entry = registry.find(one.name)
        entry.object  # noqa: B018  (imports the file, whose decorator then tells)
        assert Entry(**vars(one)) == registry.find(one.name)


def test_every_room_belongs_to_one_kind():
    rooms = [room for kind in KINDS for room in kind.rooms]
    assert len(rooms) == len(set(rooms))
    for one in declared():
        assert any(one.module == r or one.module.startswith(f"{r}.") for r in rooms)
