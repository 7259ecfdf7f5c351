"""The works of Shakespeare, shipped with the package, and passages drawn from them by seed."""

from __future__ import annotations

import lzma
import random
from functools import cache
from importlib.resources import files


@cache
def shakespeare() -> str:
    """All 42 plays and poems as one string (5.0 million characters)."""
    packed = files("attlas").joinpath("data", "shakespeare.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8")


def passage(rng: random.Random, characters: int) -> str:
    """A passage of `characters` characters that begins at the start of a line.

    The place is drawn uniformly; the end of the file is never run over.
    """
    text = shakespeare()
    if not 0 < characters < len(text):
        raise ValueError(f"characters must be between 1 and {len(text) - 1}, got {characters}")
    place = rng.randrange(len(text) - characters)
    start = text.rfind("\n", 0, place) + 1
    return text[start : start + characters]
