"""The seven stages, and which of them a mechanism changes, read off its class.

A class changes the stages whose methods it overrides. What no method tells, since it lies in what the
class is made of or in a whole family's way to attend, it says: `changes = ("aggregate",)`. Scaffolding
that papers share (`attlas.bases`, `attlas.cache`) changes what it says alone, not what it overrides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from attlas.catalog.kinds import LAYER, MASK, OP, PARTS, POSITION, Kind

STAGES = ("project", "position", "score", "mask", "normalize", "aggregate", "output")

#: The methods through which a subclass changes each stage, in a layer and in a part.
_METHODS = {
    "project": ("project", "make_projections", "restore", "values"),
    "position": ("position",),
    "score": ("score", "features", "score_mod"),
    "mask": ("mask",),
    "normalize": ("normalize", "weigh", "maps", "coefficients"),
    "aggregate": ("aggregate", "gates"),
    "output": ("output",),
}
#: Packages of scaffolding.
_SCAFFOLDING = ("attlas.bases", "attlas.cache")


def stages_of(obj: Callable[..., Any], kind: Kind) -> tuple[str, ...]:
    """The stages that an object's class changes, in their order.

    The plain layer changes none; a mask is the mask stage, an op the stages from score to aggregate.
    """
    own = [c for c in getattr(obj, "__mro__", ()) if c.__module__.split(".")[0] != "torch"]
    bases = {b for c in own if "kind" in vars(c) for b in c.__mro__}  # a kind's, no paper's
    told = [stage for c in own for stage in vars(c).get("changes", ())]
    papers = [c for c in own if c not in bases and is_paper(c.__module__)]
    return changed(kind, told, {name for c in papers for name in vars(c)})


def is_paper(module: str) -> bool:
    """Whether what a module's classes override is a paper's change, and no scaffolding's."""
    return not any(module == room or module.startswith(f"{room}.") for room in _SCAFFOLDING)


def changed(kind: Kind, told: Iterable[str], defined: set[str]) -> tuple[str, ...]:
    """The stages of an object whose classes say that they change some, and `defined` these methods."""
    if kind is MASK:
        return ("mask",)
    if kind is POSITION:
        return ("position",)
    if kind is OP:
        return ("score", "mask", "normalize", "aggregate")
    said = set(told)
    if kind is LAYER or kind in PARTS:
        said |= {stage for stage in STAGES if defined & set(_METHODS[stage])}
    return tuple(stage for stage in STAGES if stage in said)


def reasons(obj: Callable[..., Any]) -> dict[str, str]:
    """Why a class changes stages that its paper does not, by stage: the `beyond` of it and its bases."""
    found: dict[str, str] = {}
    for each in reversed(getattr(obj, "__mro__", ())):
        told = (line.partition(": ") for line in vars(each).get("beyond", ()))
        found |= {stage: why for stage, _, why in told}
    return found
