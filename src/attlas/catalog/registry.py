"""The registry: what is implemented, found through the decorator that each mechanism's file carries.

    @mechanism("differential-transformer", reduces_to=...)
    class Differential(Attention): ...

The list, the docs table, the command line, the contract checks, `attlas.make` and `attlas compare`
read this registry and nothing else, so a new mechanism is one new file. The package's own files are
read, not imported, until an object is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from attlas import former as former_names
from attlas.catalog.famous import famous
from attlas.catalog.kinds import TOGETHER, Kind, kind_of, kind_of_module
from attlas.catalog.source import Declared, declared
from attlas.catalog.stages import stages_of
from attlas.errors import UnknownName, UserError
from attlas.options import BadOption, by_present_names

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Reduction:
    """What a mechanism says it becomes in a special case; the contract holds it to its word.

    Attributes:
        to: name of the registered mechanism that it becomes, with the same `dim` and `heads`.
        options: constructor options of the special case.
        prepare: takes (this layer, the other layer) and sets the weights that make them equal; unless
            given, the other takes over this one's weights by name.
    """

    to: str
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any, Any], None] | None = None

    def align(self, made: Any, other: Any) -> None:
        """Set the weights that make both equal.

        Raises:
            ValueError: weights that the other has and this one not, and no `prepare` says what they are.
        """
        if self.prepare is not None:
            self.prepare(made, other)
            return
        own, wanted = made.state_dict(), other.state_dict()
        missing = [n for n, w in wanted.items() if n not in own or own[n].shape != w.shape]
        if missing:
            raise ValueError(
                f"{self.to} has the weights {missing}, which {type(made).__name__} has not, or not of "
                "their shape: say how they come about, Reduction(..., prepare=lambda layer, other: ...)"
            )
        other.load_state_dict({name: own[name] for name in wanted})


@dataclass(frozen=True)
class Registration:
    """What only the object's own file can tell, once it is imported.

    Attributes:
        object: the class or function.
        reduces_to: its declared special case.
        example: constructor options of a small instance, for the contract's checks.
    """

    object: Callable[..., Any]
    reduces_to: Reduction | None
    example: Mapping[str, Any]


@dataclass(frozen=True)
class Entry(Declared):
    """One registered object, imported when it is first asked for."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name under which it can be made or attached."""
        return (self.name, *self.aliases)

    @property
    def home(self) -> str:
        """Module and name of the object."""
        return f"{self.module}.{self.qualname}"

    @property
    def file(self) -> str:
        """The one file that defines it: relative to the package's parent folder, else its bare name."""
        if self.module.partition(".")[0] == "attlas":
            return self.module.replace(".", "/") + ".py"
        try:
            source = inspect.getsourcefile(self.object)
        except (OSError, TypeError):  # typed at a prompt
            source = None
        return (source or self.module).replace("\\", "/").rpartition("/")[2]

    @property
    def summary(self) -> str:
        """The first line of `doc`, without its stop."""
        return self.doc.partition("\n")[0].rstrip(".")

    @property
    def registration(self) -> Registration:
        """The object and what its file says of it."""
        if self.name not in _registered:
            importlib.import_module(self.module)
        return _registered[self.name]

    @property
    def object(self) -> Callable[..., Any]:
        """The class or function."""
        return self.registration.object

    @property
    def reduces_to(self) -> Reduction | None:
        """Its declared special case."""
        return self.registration.reduces_to

    @property
    def memory(self) -> str:
        """How its extra memory grows with the length, where it says so."""
        return str(getattr(getattr(self.object, "supports", None), "memory", "")) or str(
            getattr(self.object, "memory_law", "")
        )

    @property
    def example(self) -> Mapping[str, Any]:
        """Constructor options of a small instance, for the contract's checks."""
        return self.registration.example


#: By name, all that has been imported, and all that the package declares or a user registered.
_registered: dict[str, Registration] = {}
_entries: dict[str, Entry] = {}
_by_name: dict[str, str] = {}


def mechanism(
    name: str,
    *,
    paper: str | None = None,
    aliases: tuple[str, ...] = (),
    former: tuple[str, ...] = (),
    kind: Kind | None = None,
    reduces_to: Reduction | None = None,
    example: Mapping[str, Any] | None = None,
) -> Callable[[T], T]:
    """Register a class of any kind, or a function of a given one, under `name`.

    Args:
        name: how users ask for it, in kebab-case.
        paper: the catalogue row that it implements; `name` unless given, "" for building blocks.
        aliases: other names for it.
        former: names that it once had; they are taken, with a warning that tells the present one.
        kind: of a function; a class carries its kind.
        reduces_to: the special case that the contract checks.
        example: constructor options of a small instance for the contract's checks.

    Raises:
        ValueError: when one of the names is taken by another object.
        TypeError: an object of no kind or of two, or one that stands in the room of another kind.
    """

    def register(obj: T) -> T:
        if obj.__module__.partition(".")[0] != "attlas":
            _discover()  # a user's object may take no name of ours
        found = kind_of(obj, kind)
        room = kind_of_module(obj.__module__)
        if room not in (None, found) and not {room, found} <= set(TOGETHER):
            raise TypeError(
                f"{obj.__qualname__} is a {found.name}, and {obj.__module__} is no room for it; move "
                f"it to {' or '.join(found.rooms)}"
            )
        entry = _entry_of(obj, name, name if paper is None else paper, (aliases, former), found)
        _add(entry)
        _registered[name] = Registration(obj, reduces_to, dict(example or {}))
        return obj

    return register


def _entry_of(
    obj: Callable[..., Any],
    name: str,
    paper: str,
    others: tuple[tuple[str, ...], tuple[str, ...]],
    kind: Kind,
) -> Entry:
    # What a notebook or a prompt says of itself tells nothing of a class that is typed there.
    home = None if obj.__module__ == "__main__" else sys.modules.get(obj.__module__)
    of_module = (home and inspect.getdoc(home)) or ""
    own = inspect.getdoc(obj) or ""
    doc = of_module or own if inspect.isclass(obj) else own
    where = (obj.__module__, obj.__qualname__)
    return Entry(name, paper, *others, kind, *where, doc, stages_of(obj, kind))


def _add(entry: Entry) -> None:
    for known in entry.names:
        holder = _entries.get(_by_name.get(known, ""))
        if holder is not None and holder.home != entry.home:
            raise ValueError(f"name {known!r} is taken by {holder.home}")
    _entries[entry.name] = entry
    _by_name.update(dict.fromkeys(entry.names, entry.name))


def unregister(name: str) -> None:
    """Forget a registered object; for tests that define mechanisms of their own."""
    entry = _entries.pop(name)
    _registered.pop(name, None)
    for known in entry.names:
        del _by_name[known]


def entries(*kinds: Kind) -> tuple[Entry, ...]:
    """All that is registered, of these kinds or of every kind, by name."""
    _discover()
    return tuple(_entries[n] for n in sorted(_entries) if not kinds or _entries[n].kind in kinds)


def renamed(name: str, among: Iterable[Entry]) -> Entry | None:
    """The entry that was called `name` once, with a warning that tells its present name."""
    key = _key(name)
    found = next((entry for entry in among if key in entry.former), None)
    if found is not None:
        former_names.tell(f"the mechanism {name!r}", found.name)
    return found


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def find(name: str, *kinds: Kind) -> Entry:
    """The entry called `name`; names are matched in lower case, `_` as `-`.

    Args:
        name: or an alias.
        kinds: that it may be of; any unless given.

    Raises:
        UnknownName: with the nearest known names.
    """
    _discover()
    key = _key(name)
    fitting = [e for e in _entries.values() if not kinds or e.kind in kinds]
    entry = _entries.get(_by_name.get(key, ""))
    entry = renamed(name, fitting) if entry is None else entry
    if entry is None or (kinds and entry.kind not in kinds):
        what = " or ".join(kind.name for kind in kinds) or "mechanism"
        if (known := famous(name)) is not None and not kinds:
            raise UserError(f"unknown mechanism {name!r}: {known.here}")
        raise UnknownName(what, name, [n for e in fitting for n in e.names])
    return entry


def entry_of(obj: Callable[..., Any]) -> Entry | None:
    """The entry of a class or function itself; None where it is not registered."""
    name = next((n for n, found in _registered.items() if found.object is obj), None)
    return _entries.get(name or "")


def make(name: str, **options: object) -> Any:
    """Construct the mechanism `name`: `make("differential-transformer", dim=512, heads=8)`.

    Layers come back as `nn.Module`, parts as objects for `attlas.attach`, masks as `attlas.masks.Mask`.
    An op is returned with its options bound.

    Raises:
        UnknownName: no such mechanism.
        BadOption: an option that it does not take, with the nearest that it takes; a ValueError and a
            TypeError.
    """
    entry = find(name)
    made, taken = entry.object, signature(entry.object)
    known = {**taken, **getattr(made, "declared_options", {})}
    options = by_present_names(entry.name, options, known)
    if not entry.kind.constructed:
        return lambda *args, **more: made(*args, **{**options, **more})
    missing = [n for n, p in taken.items() if p.default is p.empty and n not in options]
    if missing:
        raise BadOption(f"{entry.name} needs the option {missing[0]!r}")
    return made(**options)


def signature(obj: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What it takes by name; a class whose own constructor passes `**options` on takes its base's too."""
    taken: dict[str, inspect.Parameter] = {}
    for one in obj.__mro__ if inspect.isclass(obj) else (obj,):
        if (
            inspect.isclass(one)
            and "__init__" not in vars(one)
            and "__signature__" not in vars(one)
        ):
            continue
        parameters = inspect.signature(one).parameters
        named = {
            n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        taken = {**named, **taken}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return taken


_discovered = False


def _discover() -> None:
    """Take in what the package's rooms declare; what is imported already is known."""
    global _discovered
    if _discovered:
        return
    for one in declared():
        if one.name not in _registered:
            _add(Entry(**vars(one)))
    _discovered = True
