"""What a case of reference vectors tells, and which of it an adapter has read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TypeVar

T = TypeVar("T")

#: Keys of a config that say how a case was made and nothing that is computed.
DESCRIPTIONS = frozenset({"seed", "suffix"})


class Told(MutableMapping[str, T]):
    """A mapping that notes what is read of it; asking whether a name is there reads nothing.

    Args:
        values: what is told.
        group: "config", "in", "param", "mid" or "out", before the name in a note.
        seen: the notes, which several mappings share.
    """

    def __init__(self, values: Mapping[str, T], group: str, seen: set[str]) -> None:
        self._values, self._group, self._seen = dict(values), group, seen

    def __getitem__(self, name: str) -> T:
        value = self._values[name]
        self._seen.add(f"{self._group}.{name}")
        return value

    def __setitem__(self, name: str, value: T) -> None:
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __repr__(self) -> str:
        return f"Told({self._group}: {', '.join(self._values)})"

    def unread(self) -> list[str]:
        """What nobody has read, "config.causal" or "in.mask"."""
        names = (f"{self._group}.{name}" for name in self._values)
        hidden = DESCRIPTIONS if self._group == "config" else frozenset()
        return [n for n in names if n not in self._seen and n.partition(".")[2] not in hidden]
