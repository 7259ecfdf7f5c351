"""Well-known names that have no row of their own, and what stands here instead (`famous.toml`)."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class Famous(NamedTuple):
    """A name that people ask for: the paper's title, and a sentence of what is here of it."""

    title: str
    here: str


def famous(name: str) -> Famous | None:
    """What is said of a name; None of one that is not among them. Case, spaces and `_` do not matter."""
    return _all().get("-".join(name.lower().replace("_", " ").split()))


@cache
def _all() -> dict[str, Famous]:
    text = files("attlas.catalog").joinpath("famous.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["famous"]
    return {name: Famous(row["title"], row["here"]) for row in rows for name in row["names"]}
