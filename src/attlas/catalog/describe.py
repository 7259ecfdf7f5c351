"""The options of a registered object as `attlas show` lists them: name, type, default and meaning."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from attlas.catalog.registry import signature

#: The section of a docstring that tells of arguments: its lines are indented, `name: meaning`.
_SECTION = re.compile(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", re.MULTILINE)
_ARGUMENT = re.compile(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


class Described(NamedTuple):
    """One option."""

    name: str
    type: str
    default: str
    meaning: str

    @property
    def told(self) -> str:
        """Name, type and default as they stand in a signature."""
        shown = f"{self.name}: {self.type}" if self.type else self.name
        return f"{shown} = {self.default}" if self.default else shown


def described(obj: Callable[..., Any]) -> list[Described]:
    """What an object takes, in the order of its signature."""
    declared = getattr(obj, "declared_options", {})
    docs = _meanings(obj)
    found = []
    for name, parameter in signature(obj).items():
        meaning = declared[name].meaning if name in declared else docs.get(name, "")
        default = "" if parameter.default is parameter.empty else _shown(parameter.default)
        kind = declared[name].told if name in declared else _type(parameter)
        found.append(Described(name, kind, default, meaning))
    return found


def _meanings(obj: Callable[..., Any]) -> dict[str, str]:
    """Meanings by argument, from the docstrings of an object and its bases, the nearest first."""
    found: dict[str, str] = {}
    for each in obj.__mro__ if inspect.isclass(obj) else (obj,):
        doc = inspect.cleandoc(each.__doc__ or "")
        for body in _SECTION.findall(doc):
            for name, meaning in _ARGUMENT.findall(body):
                found.setdefault(name, " ".join(meaning.split()).rstrip("."))
    return found


def _type(parameter: inspect.Parameter) -> str:
    if parameter.annotation is parameter.empty:
        return ""
    told = parameter.annotation
    text = told if isinstance(told, str) else inspect.formatannotation(told)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)


def _shown(value: object) -> str:
    """A default in a line: a function by its name."""
    return getattr(value, "__name__", None) or repr(value)
