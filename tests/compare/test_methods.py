from __future__ import annotations

import pytest

from attlas.attach import Part
from attlas.catalog import registry
from attlas.catalog.kinds import STEER
from attlas.compare.methods import parse_method, parse_methods
from attlas.errors import UserError


def test_labels_are_written_one_way():
    methods = parse_methods(
        [
            "full, streaming-llm(sinks=4,keep=.25)",
            "streaming-llm(keep=0.25, sinks=4)",
            "snapkv(keep=0.5)",
        ]
    )
    labels = [method.label for method in methods]
    assert labels == ["full", "streaming-llm(keep=0.25, sinks=4)", "snapkv(keep=0.5)"]
    assert methods[0].parts() == ()
    assert methods[1].parts()[0].sinks == 4


def test_a_bare_name_that_needs_a_budget_takes_half():
    methods = parse_methods(["snapkv,streaming-llm+quantized-cache,zipcache"])
    assert [m.label for m in methods] == [
        "snapkv(keep=0.5)", "streaming-llm(keep=0.5)+quantized-cache", "zipcache",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snapvk(keep=0.5)", "snapkv"),
        ("snapkv(keep=0.0)", "keep must be above 0"),
        ("snapkv(keep=1.5)", "keep must be above 0"),
        ("snapkv(kep=0.5)", "takes no option 'kep'"),
        ("snapkv()", "exactly one of keep"),
        ("snapkv(keep='half')", "snapkv"),
        ("snapkv(0.5)", "cannot be read"),
        ("snapkv(keep=0.5", "cannot be read"),
        ("snapkv(keep=0.5) + 1", "cannot be read"),
        ("snapkv(keep=__import__('os').system('true'))", "cannot be read"),
        ("snapkv(**{'keep': 0.5})", "cannot be read"),
        ("full(keep=0.5)", "takes no options"),
        ("multi-query-attention", "cannot be attached"),
        ("", "no method"),
    ],
)
def test_mistakes_are_named(text, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        parse_methods([text])


def test_a_part_registered_anywhere_can_be_named():
    @registry.mechanism("toy-part", paper="")
    class ToyPart(Part):
        kind = STEER

        def __init__(self, strength: float = 1.0) -> None:
            self.strength = strength

    try:
        assert parse_method("toy-part(strength=2.0)").parts()[0].strength == 2.0
    finally:
        registry.unregister("toy-part")
