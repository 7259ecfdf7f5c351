"""This package's functions without the checks of shapes that an import hook put around them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isclass, isfunction
from typing import Any

import jaxtyping


@contextmanager
def unchecked() -> Iterator[None]:
    """Inside, functions are called as they stand in their files, as users have them.

    While tests run, jaxtyping's import hook wraps every function. Its switch does not help Dynamo, which
    cannot trace the wrapper even where that only hands on: a graph would break at every call.
    """
    held = list(_wrapped())
    for owner, name, wrapper in held:
        setattr(owner, name, _inside(wrapper))
    decorator = jaxtyping.jaxtyped
    jaxtyping.jaxtyped = _nothing  # type: ignore[assignment]  # what functions within functions are wrapped with, as they are made
    try:
        yield
    finally:
        jaxtyping.jaxtyped = decorator
        for owner, name, wrapper in held:
            setattr(owner, name, wrapper)


def _nothing(**_: Any) -> Any:
    return _same


def _same(function: Any) -> Any:
    return function


def _wrapped() -> Iterator[tuple[Any, str, Any]]:
    """(module or class, name, wrapper) of every function that is wrapped."""
    package = __name__.partition(".")[0]
    for title, module in list(sys.modules.items()):
        if title.partition(".")[0] != package:
            continue
        own = [c for c in vars(module).values() if isclass(c) and c.__module__ == title]
        for owner in (module, *own):
            for name, value in vars(owner).items():
                if _inside(value) is not value:
                    yield owner, name, value


def _inside(value: Any) -> Any:
    """What a wrapper is around; anything else as it is."""
    if isinstance(value, staticmethod | classmethod):
        inner = _inside(value.__func__)
        return value if inner is value.__func__ else type(value)(inner)
    if isinstance(value, property):
        inner = _inside(value.fget)
        return value if inner is value.fget else property(inner, value.fset, value.fdel)
    wraps = isfunction(value) and value.__globals__.get("__name__") == "jaxtyping._decorator"
    return getattr(value, "__wrapped__", value) if wraps else value
