"""The seven stages, and which of them a mechanism changes, read off its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attlas.catalog.kinds import LAYER, MASK, OP, PARTS, POSITION, Kind

STAGES = ("project", "position", "score", "mask", "normalize", "aggregate", "output")

#: The methods through which a subclass changes each stage, in a layer and in a part.
_METHODS = {
    "project": ("project", "build"),
    "position": ("position",),
    "score": ("score", "features", "score_mod"),
    "mask": ("mask",),
    "normalize": ("normalize",),
    "aggregate": ("aggregate",),
    "output": ("output",),
}


def stages_of(obj: Callable[..., Any], kind: Kind) -> tuple[str, ...]:
    """The stages whose methods an object's class overrides, in their order.

    The plain layer changes none; a mask is the mask stage, an op the stages from score to aggregate.
    A class whose change lies in what it is made of (ALiBi's position, say) names its `stages` itself.
    """
    own = [c for c in getattr(obj, "__mro__", ()) if c.__module__.split(".")[0] != "torch"]
    below = [c for c in own if "kind" not in vars(c) and c is not object]
    return overridden(kind, getattr(obj, "stages", None), {n for c in below for n in vars(c)})


def overridden(
    kind: Kind, declared: tuple[str, ...] | None, defined: set[str]
) -> tuple[str, ...]:
    """The stages of an object that names its `declared` ones, or whose classes `defined` these."""
    if declared is not None:
        return declared
    if kind is MASK:
        return ("mask",)
    if kind is POSITION:
        return ("position",)
    if kind is OP:
        return ("score", "mask", "normalize", "aggregate")
    if kind is not LAYER and kind not in PARTS:
        return ()
    return tuple(s for s in STAGES if defined & set(_METHODS[s]))
