"""Kinds: what a registered object is, where papers of its kind live, and how one is run.

A base class carries its kind (`kind = LAYER`), and whoever derives from it is of that kind; a function
is registered with its kind, `@mechanism("bigbird-mask", kind=MASK)`. Nothing is guessed from the shape
of an object: one of no kind, or of two, is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What all objects of a kind have in common.

    Attributes:
        name: of the kind, in singular.
        rooms: packages or modules in which papers of this kind live, one paper a file.
        checks: modules whose checks it signs, see `attlas.contract`.
        signs: names of the families of checks that it signs.
        run: how a user makes or runs one; NAME stands for its name.
        small: constructor options of the small instances that checks make, under an object's own.
        constructed: whether `attlas.make` constructs it; else it binds options to a function.
    """

    name: str
    rooms: tuple[str, ...]
    checks: tuple[str, ...]
    signs: tuple[str, ...]
    run: str
    small: Mapping[str, Any] = field(default_factory=dict, hash=False)
    constructed: bool = True


def _part(name: str, *rooms: str, run: str = "attlas.attach(model, attlas.make('NAME', ...))") -> Kind:
    """A kind of the second door: every part signs the checks of parts, and those of its own kind."""
    places = tuple(f"attlas.parts.{room}" for room in rooms)
    checks = ("attlas.contract.parts", "attlas.contract.steering")
    return Kind(name, places, checks, ("part", name), run)


def _alone(name: str, room: str, run: str) -> Kind:
    return Kind(name, (room,), (f"attlas.contract.{name}s",), (name,), run)


LAYER = Kind(
    "layer", ("attlas.attention", "attlas.layers"),
    ("attlas.contract.networks", "attlas.contract.layers"), ("network", "layer"),
    "attlas.make('NAME', dim=..., heads=...); attlas train --mechanisms NAME",
    {"dim": 16, "heads": 2},
)  # fmt: skip
OP = Kind(
    "op", ("attlas.ops",), ("attlas.contract.ops",), ("op",), "attlas.make('NAME', ...)(q, k, v)",
    constructed=False,
)  # fmt: skip
MASK = Kind(
    "mask", ("attlas.masks",), ("attlas.contract.masks",), ("mask",),
    "attlas.make(LAYER, mask=attlas.make('NAME', ...))",
)  # fmt: skip
POSITION = Kind(
    "position", ("attlas.positions",), ("attlas.contract.positions",), ("position",),
    "attlas.make(LAYER, position=attlas.make('NAME', ...))",
)  # fmt: skip
CACHE = _part("cache", "evict", "quantize")
SELECT = _part("select", "select")
RECORD = _part("record", "record", run="attlas.attach(model, record=['NAME'])")
STEER = _part("steer", "steer")
PATCH = _part("patch", "patch")
MODULE = Kind(
    "module", ("attlas.modules",),
    ("attlas.contract.networks", "attlas.contract.modules"), ("network", "module"),
    "attlas.make('NAME', channels=...); attlas train --task digits-shifted --mechanisms NAME",
    {"channels": 8},
)  # fmt: skip
ADAPTER = _alone("adapter", "attlas.adapt", "attlas adapt MODEL --with NAME")
STUDY = Kind(
    "study", ("attlas.studies",), ("attlas.contract.studies",), ("study",), "attlas study NAME"
)
SYSTEM = _alone("system", "attlas.systems", "attlas run NAME")
ANALYSIS = Kind(
    "analysis", ("attlas.analyses",), ("attlas.contract.analyses",), ("analysis",),
    "attlas inspect MODEL --with NAME",
)  # fmt: skip
TASK = _alone("task", "attlas.tasks", "attlas compare --tasks NAME, or attlas train --task NAME")

#: Every kind. A room belongs to one of them.
KINDS = (
    LAYER, OP, MASK, POSITION, CACHE, SELECT, RECORD, STEER, PATCH, MODULE, ADAPTER, STUDY, SYSTEM, TASK,
    ANALYSIS,
)  # fmt: skip
#: The kinds that attach to a pretrained model.
PARTS = (CACHE, SELECT, RECORD, STEER, PATCH)
#: The kinds that one paper may have in one file: it records with a part, steers with another, analyses.
TOGETHER = (*PARTS, ANALYSIS)


def kind_of(obj: Callable[..., Any], given: Kind | None = None) -> Kind:
    """The kind that a class carries, or that a function was given.

    Of the classes that an object derives from, the nearest that carries a kind decides, if it derives
    from all others that do.

    Raises:
        TypeError: an object of no kind, or of two.
    """
    name = getattr(obj, "__qualname__", repr(obj))
    carriers = [c for c in obj.__mro__ if "kind" in vars(c)] if inspect.isclass(obj) else []
    kinds = [vars(c)["kind"] for c in carriers]
    found = kinds[0] if kinds else given
    if not isinstance(found, Kind):
        bases = "Attention, Part's sub-bases, FeatureMap, Adapter, Study, System, Task, Analysis"
        raise TypeError(
            f"{name} is of no kind: derive it from a base class that carries one ({bases}), or give a "
            "function its kind: @mechanism(name, kind=OP)"
        )
    # A class that derives from two bases of different kinds says itself which of them it is.
    own = carriers[0].__mro__ if carriers else ()
    clash = [k for c, k in zip(carriers, kinds, strict=True) if k is not found and c not in own]
    clash += [given] if given is not None and given is not found else []
    if clash:
        raise TypeError(f"{name} is of two kinds, {found.name} and {clash[0].name}; give it one")
    return found


def kind_of_module(module: str) -> Kind | None:
    """The kind whose room holds a module; None outside all rooms."""
    for kind in KINDS:
        if any(module == room or module.startswith(f"{room}.") for room in kind.rooms):
            return kind
    return None
