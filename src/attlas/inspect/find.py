"""What there is to look with: recorders and analyses by name, and the presets that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attlas.attach.part import Recorder
from attlas.catalog import registry
from attlas.catalog.kinds import ANALYSIS, RECORD
from attlas.compare.methods import parse_call, split, written
from attlas.errors import UnknownName, UserError
from attlas.kinds.analysis import Analysis

#: What the presets are for. Papers say themselves to which they belong.
PRESETS = {
    "roles": "what each head does: sinks, looks back, copies, retrieves",
    "flow": "where attention flows from layer to layer",
    "circuits": "which heads carry an answer",
    "weights": "what heads do by their weights alone; no text is run",
    "sinks": "where attention rests without need",
    "compare": "the roles of two models, or of one with and without a method",
}


@dataclass(frozen=True)
class Named:
    """Something to look with, and how it was asked for.

    Attributes:
        label: its name, with the options that were given.
        looker: itself.
    """

    label: str
    looker: Recorder | Analysis


def chosen(preset: str, names: Sequence[str] = ()) -> list[Named]:
    """What a preset looks with, or what was named in its place.

    Args:
        preset: one of `PRESETS`.
        names: "head-roles", "retrieval-heads(depths=4)", several with commas.

    Raises:
        ValueError: an unknown preset or name, or one that tells nothing of heads.
    """
    if preset not in PRESETS:
        raise UnknownName("preset", preset, list(PRESETS))
    asked = [text for each in names for text in split(each)]
    if asked:
        return list({named.label: named for named in map(_made, asked)}.values())
    wanted = "roles" if preset == "compare" else preset
    found = [e for e in registry.entries(RECORD, ANALYSIS) if _inspects(e.object) == wanted]
    return [Named(entry.name, registry.make(entry.name)) for entry in found]


def fresh(lookers: Sequence[Named]) -> list[Named]:
    """The same to look with, which have seen nothing yet."""
    return [_made(named.label) for named in lookers]


def _inspects(object_: Any) -> str:
    return str(getattr(object_, "inspects", ""))


def _made(text: str) -> Named:
    name, options = parse_call("with", text)
    entry = registry.find(name)
    known = [e.name for e in registry.entries(RECORD, ANALYSIS)]
    if entry.kind not in (RECORD, ANALYSIS):
        raise UserError(f"--with takes recorders and analyses, and {name!r} is a {entry.kind.name}")
    looker = registry.make(name, **options)
    if isinstance(looker, Recorder) and type(looker).head_scores is Recorder.head_scores:
        raise UserError(
            f"--with {name}: it records and tells no score of heads; those that do are among {known}"
        )
    return Named(written(entry.name, tuple(options.items())), looker)
