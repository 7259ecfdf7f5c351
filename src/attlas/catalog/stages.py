"""The seven stages, and which of them a mechanism changes, read off its class."""

from __future__ import annotations

from attlas.catalog.registry import Entry

STAGES = ("project", "position", "score", "mask", "normalize", "aggregate", "output")

#: The methods through which a subclass changes each stage.
_METHODS = {
    "project": ("project", "build"),
    "position": ("position",),
    "score": ("score", "features", "score_mod"),
    "mask": ("mask",),
    "normalize": ("normalize",),
    "aggregate": ("aggregate",),
    "output": ("output",),
}


def stages_of(entry: Entry) -> tuple[str, ...]:
    """The stages whose methods the object's class overrides, in their order.

    The plain layer changes none; a mask is the mask stage, an op the stages from score to aggregate.
    A class whose change lies in what it is made of (ALiBi's position, say) names its `stages` itself.
    """
    declared: tuple[str, ...] | None = getattr(entry.object, "stages", None)
    if declared is not None:
        return declared
    if entry.kind == "mask":
        return ("mask",)
    if entry.kind == "op":
        return ("score", "mask", "normalize", "aggregate")
    bases = {"Attention", "Part", "Module", "object"}
    own = [c for c in getattr(entry.object, "__mro__", ()) if c.__name__ not in bases]
    defined = {name for c in own for name in vars(c) if c.__module__.split(".")[0] != "torch"}
    return tuple(s for s in STAGES if defined & set(_METHODS[s]))
