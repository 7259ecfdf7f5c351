"""Options are said once: in the class body, from which come signature, checks, help and messages."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import pytest
import torch
from torch import nn

from attlas import Attention
from attlas.attach.call import Call, ForwardPass
from attlas.cache.policy import CachePolicy
from attlas.catalog import registry
from attlas.catalog.describe import described
from attlas.hints import fits, type_of
from attlas.options import BadOption, Configured, Option, option


class Plain(Configured):
    """Something with options.

    Raises:
        ValueError: what its parts refuse.
    """

    size: int = option("how large it is", at_least=1, kw_only=False)
    half: int = option("half of it; size / 2 unless given", factory=lambda it: it.size // 2)
    share: float = option("a share", default=0.5, above=0, at_most=1)
    mode: Literal["fast", "exact"] = option("how it is done", default="fast", former="method")
    steps: tuple[int, ...] = option("some steps", default=(), at_least=0)
    own_name: str | None = option("what it is called", default=None, alias="name")
    flags: ClassVar[int] = 3

    def setup(self) -> None:
        self.done = self.size + self.half

    def name(self) -> str:
        return self.own_name or "none"


class Finer(Plain):
    """One with another default and an option more."""

    share: float = option("a small share", default=0.1, above=0, at_most=1)
    depth: int = option("how deep", default=0)


def test_values_come_from_the_call_the_default_or_the_factory():
    one = Plain(8, share=1, name="x")
    assert one.options == {
        "size": 8, "half": 4, "share": 1, "mode": "fast", "steps": (), "name": "x"
    }  # fmt: skip
    assert (one.done, one.name(), Plain(8, half=None).half) == (12, "x", 4)
    assert Plain(**one.options).options == one.options


def test_subclasses_inherit_options_and_change_defaults_in_place():
    assert list(inspect.signature(Finer).parameters) == [
        "size", "half", "share", "mode", "steps", "name", "depth"
    ]  # fmt: skip
    assert Finer(4).share == 0.1
    assert Plain(4).share == 0.5
    assert inspect.signature(Finer).parameters["size"].kind.name == "POSITIONAL_OR_KEYWORD"


def test_a_subclass_can_do_without_an_inherited_option():
    class Fixed(Plain):
        without = ("share", "half")

    one = Fixed(8)
    assert (one.share, one.half) == (0.5, 4)
    assert list(one.options) == ["size", "mode", "steps", "name"]
    assert "share" not in (Fixed.__doc__ or "")
    with pytest.raises(BadOption, match="takes no option 'share'"):
        Fixed(8, share=0.5)


def test_help_tells_types_defaults_and_meanings():
    assert "share: 'float' = 0.1" in str(inspect.signature(Finer))
    assert "share: a small share." in (Finer.__doc__ or "")
    assert (Plain.__doc__ or "").index("Args:") < (Plain.__doc__ or "").index("Raises:")
    told = {each.name: each for each in described(Finer)}
    assert told["half"].told == "half: int | None = None"
    assert told["depth"].meaning == "how deep"


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"sise": 3}, BadOption, "takes no option 'sise'; did you mean 'size'"),
        ({}, BadOption, "needs the option 'size'"),
        ({"size": "3"}, TypeError, "size takes int, got '3'"),
        ({"size": True}, TypeError, "size takes int, got True"),
        ({"size": None}, TypeError, "size takes int"),
        ({"size": 2.5}, TypeError, "size takes int"),
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": 3, "share": 0}, ValueError, "share must be above 0 and at most 1, got 0"),
        ({"size": 3, "share": float("nan")}, ValueError, "share must be"),
        ({"size": 3, "steps": (1, -1)}, ValueError, "steps must be at least 0"),
        ({"size": 3, "steps": ("a",)}, TypeError, "steps takes"),
        ({"size": 3, "mode": "exakt"}, ValueError, "'fast' or 'exact', got 'exakt'.*'exact'"),
        ({"size": 3, "mode": 1}, TypeError, "mode takes"),
    ],
)
def test_what_is_wrong_is_refused_by_name(given, error, words):
    with pytest.raises(error, match=words):
        Plain(**given)


def test_former_names_are_taken_and_tell_the_present_one():
    with pytest.warns(FutureWarning, match="option 'method' of Plain is called 'mode' now"):
        assert Plain(3, method="exact").mode == "exact"
    with pytest.raises(BadOption, match="did you mean 'mode'"):
        Plain(3, method="exact", mode="fast")
    with pytest.warns(FutureWarning, match="mechanism 'window' is called 'streaming-llm' now"):
        policy = registry.make("window", keep=0.5)
    assert type(policy).__name__ == "StreamingLLM"
    with pytest.warns(FutureWarning, match="'recent'"):
        assert registry.make("q-filters", keep=0.5, window=3).recent == 3


def test_members_of_former_names_are_refused_where_nothing_would_call_them():
    with pytest.raises(TypeError, match=r"takes_masks: it is supports = Supports\(masks=...\) now"):
        type("Old", (Attention,), {"takes_masks": "padding"})
    with pytest.raises(TypeError, match="settle: it is compress now"):
        type("Old", (CachePolicy,), {"settle": lambda self, layer, state, rows: None})
    call = Call(0, nn.Identity(), *torch.zeros(3, 1, 1, 1, 1), 1.0, None, ForwardPass(length=1))
    with pytest.warns(FutureWarning, match="call.columns is called 'original_positions' now"):
        assert call.columns is None
    with pytest.raises(AttributeError, match="'Call' object has no attribute 'colums'"):
        _ = call.colums


def test_places_are_told():
    with pytest.raises(BadOption, match=r"1 options by place \['size'\], got 2"):
        Plain(3, 4)
    with pytest.raises(BadOption, match="size twice"):
        Plain(3, size=4)


def test_a_body_that_says_an_option_by_halves_is_refused():
    with pytest.raises(TypeError, match="needs a type"):
        type("Bare", (Configured,), {"size": option("a size", default=1)})
    with pytest.raises(TypeError, match=r"option\('its meaning', default=3\)"):

        class Field(Configured):
            size: int = 3

    with pytest.raises(TypeError, match="at_leest"):
        option("a size", default=1, at_leest=1)  # type: ignore[call-overload]


def test_a_constructor_of_ones_own_still_works():
    class Old(Plain):
        def __init__(self, size, *, extra=1, **options):
            super().__init__(size, **options)
            self.extra = extra

    assert (Old(4, extra=2, share=0.2).share, Old(4).extra) == (0.2, 1)
    assert set(registry.signature(Old)) == {*registry.signature(Plain), "extra"}


def test_a_module_given_as_an_option_is_registered_by_setup_alone():
    class Holder(Configured, nn.Module):
        given: nn.Module = option("a module")

        def setup(self) -> None:
            self.held = self.given

    holder = Holder(given=nn.Linear(2, 2))
    assert list(holder.state_dict()) == ["held.weight", "held.bias"]
    assert copy.deepcopy(holder).given is not holder.given


def test_objects_copy_and_pickle():
    one = pickle.loads(pickle.dumps(Plain(8, mode="exact")))
    assert one.options == Plain(8, mode="exact").options
    assert copy.deepcopy(one).options == one.options


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (3, int, True), (True, int, False), (3, float, True), ("a", float, False),
        (None, int | None, True), ("x", Literal["x", "y"] | None, True), ("z", Literal["x"], False),
        (True, Literal[1], False), ((1, 2), tuple[int, int], True), ((1,), tuple[int, int], False),
        ((1, 2, 3), tuple[int, ...], True), (("a",), tuple[int, ...], False),
        ([1], Sequence[int], True), ("ab", Sequence[str], False),
        ({"a": 1}, Mapping[str, int], True), ({1: 1}, Mapping[str, int], False),
        (len, Callable[[int], int], True), (3, Callable[[int], int], False),
        (((1, 2), (3, 4)), Sequence[tuple[int, int]], True), (object(), str | float, False),
    ],
)  # fmt: skip
def test_values_fit_types(value, hint, wanted):
    assert fits(value, hint) is wanted


def test_an_iterator_is_not_exhausted_by_looking_at_it():
    numbers = iter([1, 2])
    assert fits(numbers, Iterable[int])
    assert list(numbers) == [1, 2]


def test_lists_of_json_are_taken_for_tuples_and_numbers_have_their_words():
    class Pair(Configured):
        sizes: tuple[int, int] = option("two sizes", default=(1, 2), at_least=1)
        patch: Literal[1, 2, 4] = option("its side", default=2)

    assert Pair(sizes=[3, 4]).sizes == (3, 4)
    with pytest.raises(ValueError, match="patch must be 1 or 2 or 4, got 3"):
        Pair(patch=3)


@pytest.mark.parametrize("name", [entry.name for entry in registry.entries()])
def test_every_object_tells_all_its_options(name):
    for each in described(registry.find(name).object):
        assert each.type, f"{name}: {each.name} has no type"
        assert each.meaning, f"{name}: {each.name} has no meaning"
    declared = getattr(registry.find(name).object, "declared_options", {})
    for one in declared.values():
        assert isinstance(one, Option)
        assert not one.meaning.endswith("."), one.meaning
        assert "\n" not in one.meaning
        assert type_of(one.type, one.module) is not None


@pytest.mark.parametrize("name", [entry.name for entry in registry.entries()])
def test_every_object_refuses_what_is_no_option_or_of_another_type(name):
    with pytest.raises(BadOption, match="no_such_option"):
        registry.make(name, no_such_option=1)
    for one in getattr(registry.find(name).object, "declared_options", {}).values():
        with pytest.raises(TypeError, match=one.parameter):
            one.checked(object())
