"""The plan: what is trained on what, and all that decides which numbers come out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from attlas.catalog import registry
from attlas.catalog.kinds import LAYER, MODULE
from attlas.catalog.registry import Entry
from attlas.compare.methods import parse_call, split, written
from attlas.errors import UnknownName, UserError
from attlas.options import by_present_names
from attlas.tasks.train import Task, find

#: Options of each kind that is trained which the model sets by itself.
SET_BY_MODEL = {
    LAYER: ("dim", "heads", "head_dim", "causal", "mask", "layer_idx"),
    MODULE: ("channels", "previous"),
}
#: Stands for a network without a module.
NONE = "none"


@dataclass(frozen=True, slots=True)
class Mechanism:
    """A mechanism with its options; its label is written one way, however the user wrote it.

    Attributes:
        label: as tables show it.
        name: registered.
        options: of its constructor.
        others: mechanisms of the layers behind, where layers take turns.
    """

    label: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()
    others: tuple[Mechanism, ...] = ()

    @property
    def turns(self) -> tuple[Mechanism, ...]:
        """Of one layer after the other, again and again."""
        return (self, *self.others)

    @property
    def entry(self) -> Entry:
        """What is registered under the name."""
        return registry.find(self.name)

    @property
    def attention(self) -> list[dict[str, Any]]:
        """As the models of `attlas.models` take it."""
        return [{"name": each.name, **dict(each.options)} for each in self.turns]


class Run(NamedTuple):
    """One model to train; its name in the results file."""

    mechanism: str
    seed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained.

    Attributes:
        task: as written, with its options.
        mechanisms: compared.
        seeds: of the initialisation and of the data's order; 0, 1, …
        steps: of the optimiser.
        batch: rows of a step, over all processes and accumulated parts.
        accumulate: parts that a process's rows of a step are read in.
        rate: the highest learning rate.
        dim: the model's width.
        layers: of the model.
        heads: of each layer.
        tested: rows of each test split.
        save: steps between two checkpoints.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
    """

    task: str
    mechanisms: tuple[Mechanism, ...]
    seeds: int
    steps: int
    batch: int
    accumulate: int
    rate: float
    dim: int
    layers: int
    heads: int
    tested: int
    save: int
    device: str
    dtype: str

    @property
    def settings(self) -> dict[str, Any]:
        """What all runs of a folder have in common; others may be added to them."""
        free = ("mechanisms", "seeds", "save", "accumulate")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}

    def runs(self) -> list[Run]:
        """All runs in their order: every mechanism with the first seed, then the next seed."""
        return [Run(m.label, seed) for seed in range(self.seeds) for m in self.mechanisms]

    def mechanism(self, label: str) -> Mechanism:
        """The mechanism of a run."""
        return next(m for m in self.mechanisms if m.label == label)

    def made_task(self) -> Task:
        """The task."""
        return parse_task(self.task)[1]


def parse_task(text: str) -> tuple[str, Task]:
    """A task written as `name(option=value, ...)`: its label and itself.

    Raises:
        UnknownName: with the nearest task.
        UserError: the grammar or an option is wrong.
    """
    name, options = parse_call("task", text)
    cls = find(name)
    known = cls.declared_options
    options = by_present_names(f"task {cls.name}", options, known)
    given = [(option, options[option]) for option in known if option in options]
    try:
        return written(cls.name, given), cls(**options)
    except ValueError as error:
        raise UserError(f"task {written(cls.name, given)}: {error}") from error


def parse_mechanisms(texts: list[str]) -> tuple[Mechanism, ...]:
    """All mechanisms named in `texts`, each a list with commas; one named twice counts once.

    Several joined by + are one whose layers take turns.

    Raises:
        UserError: one that cannot be read, is no layer or module, or takes no such option.
    """
    found = {m.label: m for text in texts for m in map(_in_turns, split(text))}
    if not found:
        raise UserError("mechanisms names none; write for example softmax,differential-transformer")
    return tuple(found.values())


def _in_turns(text: str) -> Mechanism:
    first, *others = (_mechanism(piece) for piece in split(text, "+"))
    label = "+".join(each.label for each in (first, *others))
    return replace(first, label=label, others=tuple(others))


def _mechanism(text: str) -> Mechanism:
    name, options = parse_call("mechanism", text)
    if name == NONE:
        if options:
            raise UserError(f"mechanism none takes no options, got {options}")
        return Mechanism(NONE, NONE)
    try:
        entry = registry.find(name)
    except UnknownName:
        names = [known for entry in registry.entries(*SET_BY_MODEL) for known in entry.names]
        raise UnknownName("mechanism", name, names) from None
    if entry.kind not in SET_BY_MODEL:
        raise UserError(
            f"mechanism {name!r} is a {entry.kind.name}, which has no weights to train; `attlas compare` "
            "tries it on a pretrained model"
        )
    fixed = SET_BY_MODEL[entry.kind]
    taken = [o for o in registry.signature(entry.object) if o not in fixed]
    for option in options:
        if option in fixed:
            raise UserError(f"mechanism {entry.name}: {option} is set by the model, see --help")
    declared = getattr(entry.object, "declared_options", {})
    options = by_present_names(entry.name, options, {name: declared.get(name) for name in taken})
    given = tuple(sorted(options.items(), key=lambda o: taken.index(o[0])))
    return Mechanism(written(entry.name, given), entry.name, given)
