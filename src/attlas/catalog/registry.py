"""The registry: what is implemented, found through the decorator that each mechanism's file carries.

    @mechanism("differential-transformer", reduces_to=...)
    class Differential(Attention): ...

The list, the docs table, the command line, the contract checks, `attlas.make` and `attlas compare`
read this registry and nothing else, so a new mechanism is one new file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from types import ModuleType
from typing import Any, TypeVar

from attlas.errors import UnknownName

T = TypeVar("T", bound=Callable[..., Any])

#: Packages whose modules are imported when the registry is first read.
ROOMS = ("attlas.attention", "attlas.layers", "attlas.masks", "attlas.ops", "attlas.parts")


@dataclass(frozen=True)
class Reduction:
    """What a mechanism says it becomes in a special case; the contract holds it to its word.

    Attributes:
        to: name of the registered mechanism that it becomes, with the same `dim` and `heads`.
        options: constructor options of the special case.
        prepare: takes (this layer, the other layer) and sets the weights that make them equal.
    """

    to: str
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any, Any], None] | None = None


@dataclass(frozen=True)
class Entry:
    """One registered object.

    Attributes:
        name: the name under which it is made.
        object: the class or function.
        paper: slug of its catalogue row; empty for building blocks that no row names.
        aliases: other names.
        kind: "layer", "part", "op" or "mask", told from the object itself.
        reduces_to: its declared special case.
        example: constructor options of a small instance, for the contract's checks.
    """

    name: str
    object: Callable[..., Any]
    paper: str
    aliases: tuple[str, ...]
    kind: str
    reduces_to: Reduction | None
    example: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Every name under which it can be made or attached."""
        return (self.name, *self.aliases)

    @property
    def file(self) -> str:
        """The one file that defines it, relative to the folder of its top package.

        Its folders are the module's packages, so that it is the same wherever the checkout lies.
        """
        module = self.object.__module__
        path = getattr(sys.modules.get(module), "__file__", None)
        if path is None:  # a page, a notebook or a prompt
            return module
        folders, name = module.split("."), PurePath(path).name
        return "/".join([*(folders if name == "__init__.py" else folders[:-1]), name])

    @property
    def doc(self) -> str:
        """The docstring that tells the mechanism: its module's, or its own when it has more."""
        module_doc = inspect.getdoc(inspect.getmodule(self.object)) or ""
        own = inspect.getdoc(self.object) or ""
        return own if self.kind in ("op", "mask") or not module_doc else module_doc


_entries: dict[str, Entry] = {}
_by_name: dict[str, str] = {}
_discovered = False


def mechanism(
    name: str,
    *,
    paper: str | None = None,
    aliases: tuple[str, ...] = (),
    reduces_to: Reduction | None = None,
    example: Mapping[str, Any] | None = None,
) -> Callable[[T], T]:
    """Register a layer, a part, an op or a mask under `name`.

    Args:
        name: how users ask for it, in kebab-case.
        paper: the catalogue row that it implements; `name` unless given, "" for building blocks.
        aliases: other names for it.
        reduces_to: the special case that the contract checks.
        example: constructor options of a small instance for the contract's checks.

    Raises:
        ValueError: when one of the names is taken by another object.
    """

    def register(obj: T) -> T:
        entry = Entry(
            name, obj, name if paper is None else paper, aliases, _kind(obj), reduces_to,
            dict(example or {}),
        )  # fmt: skip
        for known in entry.names:
            holder = _entries.get(_by_name.get(known, ""))
            if holder is not None and _home(holder.object) != _home(obj):
                raise ValueError(f"name {known!r} is taken by {_home(holder.object)}")
        _entries[name] = entry
        _by_name.update(dict.fromkeys(entry.names, name))
        return obj

    return register


def unregister(name: str) -> None:
    """Forget a registered object; for tests that define mechanisms of their own."""
    entry = _entries.pop(name)
    for known in entry.names:
        del _by_name[known]


def entries() -> tuple[Entry, ...]:
    """All that is registered, by name."""
    _discover()
    return tuple(_entries[name] for name in sorted(_entries))


def find(name: str) -> Entry:
    """The entry called `name`; names are matched in lower case, `_` as `-`.

    Raises:
        UnknownName: with the nearest known names.
    """
    _discover()
    key = name.strip().lower().replace("_", "-")
    if key not in _by_name:
        raise UnknownName("mechanism", name, _by_name)
    return _entries[_by_name[key]]


def make(name: str, **options: Any) -> Any:
    """Construct the mechanism `name`: `make("differential-transformer", dim=512, heads=8)`.

    Layers come back as `nn.Module`, parts as objects for `attlas.attach`, masks as `attlas.masks.Mask`.
    An op is returned with its options bound.

    Raises:
        UnknownName: no such mechanism.
        ValueError: an option that it does not take, with those that it takes.
    """
    entry = find(name)
    parameters = signature(entry.object)
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        raise ValueError(
            f"{entry.name} takes no option {unknown[0]!r}; it takes {sorted(parameters)}"
        )
    if entry.kind == "op":
        return lambda *args, **more: entry.object(*args, **{**options, **more})
    missing = [
        p.name for p in parameters.values()
        if p.default is p.empty and p.name not in options
    ]  # fmt: skip
    if missing:
        raise ValueError(f"{entry.name} needs the option {missing[0]!r}")
    return entry.object(**options)


def signature(obj: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What it takes by name; a class that passes `**options` on takes what its base takes too."""
    taken: dict[str, inspect.Parameter] = {}
    for one in obj.__mro__ if inspect.isclass(obj) else (obj,):
        if inspect.isclass(one) and "__init__" not in vars(one):
            continue
        parameters = inspect.signature(one).parameters
        named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        taken = {**named, **taken}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return taken


def _kind(obj: Callable[..., Any]) -> str:
    """Told from the class's ancestors by name, so that the registry imports no room."""
    ancestors = {c.__name__ for c in getattr(obj, "__mro__", ())}
    if "Part" in ancestors:
        return "part"
    if "Module" in ancestors:
        return "layer"
    returns = inspect.signature(obj).return_annotation
    return "mask" if getattr(returns, "__name__", returns) == "Mask" else "op"


def _home(obj: Callable[..., Any]) -> str:
    return f"{obj.__module__}.{obj.__qualname__}"


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    _discovered = True  # first, since the modules below may read the registry
    for room in ROOMS:
        for module in _modules(importlib.import_module(room)):
            importlib.import_module(module)


def _modules(room: ModuleType) -> Iterator[str]:
    """Names of all modules in a package; none for a plain module."""
    for info in pkgutil.walk_packages(getattr(room, "__path__", ()), room.__name__ + "."):
        yield info.name
