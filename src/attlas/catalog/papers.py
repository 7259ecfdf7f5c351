"""The catalogue: every paper that attlas covers, and what of it exists, derived from the registry.

`papers.toml` says what is to be built for each paper; nothing in it says what is done. A row is
implemented when a registered object names its slug; whether it keeps its contract, `attlas verify` tells.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from attlas.catalog import registry
from attlas.catalog.kinds import LAYER, OP, PARTS
from attlas.catalog.registry import Entry
from attlas.catalog.stages import STAGES
from attlas.errors import UnknownName


@dataclass(frozen=True)
class Paper:
    """A row of the catalogue with what the registry holds for it.

    Attributes:
        slug: the row's name, or the mechanism's where no paper's row names it.
        title: of the paper, or the mechanism's first line.
        group: family: heads, weights, sparse, cache, …
        kind: what it is built as: layer, op, position, cache, select, steer, record, …
        stages: the stages of attention that it changes; of what exists, as its code does.
        build: what is to be built.
        works_when: when it counts as working.
        headline: the paper's own claim.
        sure: whether the equations are established.
        entries: the registered objects that name it.
    """

    slug: str
    title: str
    group: str
    kind: str
    stages: tuple[str, ...]
    build: str
    works_when: str
    headline: str
    sure: bool
    entries: tuple[Entry, ...]

    @property
    def implemented(self) -> bool:
        """Whether a registered object names this row."""
        return bool(self.entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Names under which it can be made or attached."""
        return tuple(name for entry in self.entries for name in entry.names)

    @property
    def file(self) -> str | None:
        """The one file that defines it; None while there is none."""
        return self.entries[0].file if self.entries else None

    def as_json(self) -> dict[str, Any]:
        """The fields that `attlas list --json` prints."""
        return {
            "slug": self.slug, "title": self.title, "group": self.group, "kind": self.kind,
            "stages": list(self.stages), "implemented": self.implemented,
            "names": list(self.names), "file": self.file,
        }  # fmt: skip


def papers(
    *,
    group: str | None = None,
    kind: str | None = None,
    stage: str | None = None,
    implemented: bool | None = None,
    search: str | None = None,
) -> list[Paper]:
    """The catalogue's rows, then what is registered beside them; filters keep what matches all.

    Args:
        group: family.
        kind: what it is built as.
        stage: a stage that it changes.
        implemented: True for what exists, False for what does not.
        search: words that all occur in the slug, title or description, in any case.

    Raises:
        UnknownName: a group, kind or stage that no row has, with the nearest.
    """
    found = _all()
    for what, wanted, values in (
        ("group", group, {p.group for p in found}),
        ("kind", kind, {p.kind for p in found}),
        ("stage", stage, {s for p in found for s in p.stages}),
    ):
        if wanted is not None and wanted not in values:
            raise UnknownName(what, wanted, values)
    words = (search or "").lower().split()
    return [
        p for p in found
        if group in (None, p.group) and kind in (None, p.kind)
        and (stage is None or stage in p.stages)
        and all(w in f"{p.slug} {p.title} {p.build} {' '.join(p.names)}".lower() for w in words)
        and (implemented is None or p.implemented == implemented)
    ]  # fmt: skip


def paper(name: str) -> Paper:
    """The row with this slug, or that of the mechanism with this name.

    Raises:
        UnknownName: neither, with the nearest.
    """
    rows = _all()
    key = name.strip().lower().replace("_", "-")
    for row in rows:
        if key == row.slug or key in row.names:
            return row
    entry = registry.renamed(name, (entry for row in rows for entry in row.entries))
    if entry is not None:
        return next(row for row in rows if entry in row.entries)
    raise UnknownName("paper or mechanism", name, [n for r in rows for n in (r.slug, *r.names)])


def _all() -> list[Paper]:
    entries = registry.entries()
    rows = [_row(raw, [e for e in entries if e.paper == raw["slug"]]) for raw in _toml()]
    slugs = {row.slug for row in rows}
    return rows + [_unlisted(e) for e in entries if e.paper not in slugs]


#: Words of the catalogue's rows for kinds of ours.
_KINDS = {"selection": "select", "steering": "steer", "recorder": "record"}


def _row(raw: dict[str, Any], entries: Iterable[Entry]) -> Paper:
    entries = tuple(entries)
    # What exists is of the kind that it declares; what does not, of the one that the row plans.
    kind = entries[0].kind.name if entries else _KINDS.get(raw["kind"], raw["kind"])
    derived = [entry for entry in entries if entry.kind in (LAYER, OP, *PARTS)]
    by_code = [s for s in STAGES if any(s in entry.stages for entry in derived)]
    stages = tuple(by_code if derived else raw["stages"])
    return Paper(
        raw["slug"], raw["title"], raw["group"], kind, stages, raw["build"],
        raw["works_when"], raw["headline"], raw["sure"], entries,
    )  # fmt: skip


def _unlisted(entry: Entry) -> Paper:
    """A registered object that no catalogue row names, told from its own file."""
    rest = entry.doc.partition("\n")[2]
    return Paper(
        entry.name, entry.summary, _family(entry), entry.kind.name, entry.stages,
        rest.strip().partition("\n\n")[0], "it passes the contract's checks", "", True, (entry,),
    )  # fmt: skip


def _family(entry: Entry) -> str:
    """The folder of the family names the group; "core" is the package's own, "own" the user's."""
    folders = entry.file.split("/")[:-1]
    return folders[-1].replace("attlas", "core") if folders[:1] == ["attlas"] else "own"


@cache
def _toml() -> list[dict[str, Any]]:
    text = files("attlas.catalog").joinpath("papers.toml").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = tomllib.loads(text)["paper"]
    return rows
