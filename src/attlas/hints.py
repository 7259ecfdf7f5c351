"""Annotations as types: what they mean, how they are told, and whether a value is of one.

A value is tried when an object is made, so that a wrong one is named then and there. Types are those that
options have: numbers, words, tuples, sequences, mappings, functions, classes, and unions of these.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

#: What the types of `A | B` and of Union[A, B] say they come from.
UNIONS = (typing.Union, type(int | str))


def type_of(text: str, module: str) -> Any:
    """The type that an annotation means; Any where a name in it is known to type checkers alone."""
    names = {**vars(typing), **vars(sys.modules.get(module, typing))}
    try:
        return eval(text, names)
    except NameError:
        return Any


def told(hint: Any) -> str:
    """A type in words, without the modules that hold it."""
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", inspect.formatannotation(hint))


def words(hint: Any) -> list[object]:
    """The words, or numbers, of a Literal, or of one within a union."""
    found = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return list(found)
    union = found if typing.get_origin(hint) in UNIONS else ()
    return [word for one in union for word in words(one)]


def fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type; a whole number is a float too, and True no number."""
    origin, within = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object):
        return True
    if hint in (None, type(None)):
        return value is None
    if origin in UNIONS:
        return any(fits(value, one) for one in within)
    if origin is typing.Literal:
        return any(type(value) is type(word) and value == word for word in within)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if origin is tuple and not (len(within) == 2 and within[1] is ...):
        paired = isinstance(value, tuple) and len(value) == len(within)
        return paired and all(map(fits, typing.cast("tuple[object, ...]", value), within))
    if origin is not None and issubclass(origin, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else ((None, None),)
        return isinstance(value, origin) and all(
            fits(key, within[0]) and fits(one, within[1]) for key, one in pairs
        )
    if origin is not None and issubclass(origin, Iterable):
        several = isinstance(value, origin) and not isinstance(value, str | bytes)
        read_once = isinstance(value, Iterator)  # which looking would exhaust
        return several and (
            read_once or all(fits(one, within[0]) for one in typing.cast("Any", value))
        )
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def tuples(value: object) -> object:
    """Lists, as JSON gives them, as the tuples that they were."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value
