"""The stages that `attlas show` draws are the code's; what goes beyond a paper's says why."""

from __future__ import annotations

import tomllib
from importlib.resources import files

import pytest

from attlas.catalog import registry
from attlas.catalog.kinds import LAYER, PARTS
from attlas.catalog.papers import paper
from attlas.catalog.source import declared
from attlas.catalog.stages import STAGES, reasons, stages_of

ROWS = {
    row["slug"]: set(row["stages"])
    for row in tomllib.loads(files("attlas.catalog").joinpath("papers.toml").read_text("utf-8"))["paper"]
}
NAMES = [entry.name for entry in registry.entries(LAYER, *PARTS)]


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_beyond_the_paper_says_why(name: str) -> None:
    entry = registry.find(name)
    why = reasons(entry.object)
    assert set(why) <= set(STAGES)
    assert all(why.values())
    if entry.paper in ROWS:
        assert set(entry.stages) - ROWS[entry.paper] <= set(why)


@pytest.mark.parametrize("name", NAMES)
def test_shown_stages_are_those_of_the_code(name: str) -> None:
    entry = registry.find(name)
    assert entry.stages == stages_of(entry.object, entry.kind)
    assert set(entry.stages) <= set(paper(name).stages)


def test_sources_tell_what_imported_classes_do() -> None:
    for one in declared():
        assert one.stages == stages_of(registry.find(one.name).object, one.kind), one.name


def test_stages_follow_the_overridden_methods() -> None:
    from attlas import Attention
    from attlas.bases.recurrent import RecurrentAttention

    class Scored(Attention):
        def score(self, q, k, inputs):
            return super().score(q, k, inputs)

    class Made(Scored):
        changes = ("position",)
        beyond = ("position: it is made of one",)

    class Running(RecurrentAttention):
        def gates(self, k, inputs):
            return {}

    assert stages_of(Attention, LAYER) == ()
    assert stages_of(Scored, LAYER) == ("score",)
    assert stages_of(Made, LAYER) == ("position", "score")
    assert reasons(Made) == {"position": "it is made of one"}
    assert stages_of(Running, LAYER) == ("normalize", "aggregate")
