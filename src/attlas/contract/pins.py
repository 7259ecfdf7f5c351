"""How many checks run on each registered object, pinned in files, so that no check vanishes unseen.

`make pins` counts and writes `tests/papers/SLUG/pins.json`, {name: count} for the objects of that paper,
and `tests/papers/families.json`, {family: count of its checks}. They are generated, never edited: a new
paper brings its own file, and a change of the contract shows as a change of all files that it touches.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from attlas.catalog import registry
from attlas.contract.measure import CHECKS, Check, subject_of
from attlas.contract.run import checks_of
from attlas.errors import UserError

#: It runs where there is an accelerator alone, and so is left out of counts.
DEVICES = "devices"


def pinned_checks(name: str) -> list[Check]:
    """The checks of a registered object that run on every machine."""
    return [one for one in checks_of(subject_of(name)) if one.name != DEVICES]


def counts() -> dict[str, dict[str, int]]:
    """Paper -> name -> how many checks run on it; an object that no paper's row names is its own."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for entry in registry.entries():
        found[entry.paper or entry.name][entry.name] = len(pinned_checks(entry.name))
    return dict(found)


def families() -> dict[str, int]:
    """Family -> how many checks it has, of those families that a registered object signs."""
    signed = {family for entry in registry.entries() for family in entry.kind.signs}
    for entry in registry.entries():
        checks_of(subject_of(entry.name))  # imports the modules that define the kind's checks
    found = [one.family for one in CHECKS if one.family in signed]
    return {family: found.count(family) for family in sorted(set(found))}


def read(papers: Path) -> dict[str, int]:
    """Name -> pinned count, of all objects."""
    files = sorted(papers.glob("*/pins.json"))
    return {name: n for file in files for name, n in _load(file).items()}


def read_families(papers: Path) -> dict[str, int]:
    """Family -> pinned count of its checks."""
    return _load(papers / "families.json")


def write(papers: Path) -> None:
    """Pin what runs now, and forget what is registered no longer.

    Raises:
        UserError: `papers` is no folder.
    """
    if not papers.is_dir():
        raise UserError(f"pins are written to the folder tests/papers; {papers} is not a folder")
    found = counts()
    for file in papers.glob("*/pins.json"):
        if file.parent.name not in found:
            file.unlink()
    for slug, pins in found.items():
        (papers / slug).mkdir(exist_ok=True)
        _save(papers / slug / "pins.json", pins)
    _save(papers / "families.json", families())


def _load(file: Path) -> dict[str, int]:
    return {str(name): int(n) for name, n in json.loads(file.read_text(encoding="utf-8")).items()}


def _save(file: Path, counts: dict[str, int]) -> None:
    file.write_text(json.dumps(counts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(*sys.argv[1:]))
