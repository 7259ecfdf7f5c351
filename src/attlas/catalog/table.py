"""The table of what exists, for the docs: `python -m attlas.catalog.table > docs/mechanisms.md`."""

from __future__ import annotations

from attlas.catalog.papers import Paper, papers
from attlas.catalog.stages import STAGES

_HEAD = """# Mechanisms

Generated from the registry by `make docs`; do not edit. `attlas show NAME` tells more of each.

| name | stages | kind | group | memory | what it is | file |
|---|---|---|---|---|---|---|
"""


def markdown() -> str:
    """One row for each registered object, by group and name."""
    rows = sorted((p for p in papers() if p.entries), key=lambda p: (p.group, p.slug))
    return _HEAD + "".join(_line(row) for row in rows)


def _line(row: Paper) -> str:
    lines = []
    for entry in row.entries:
        law = entry.memory
        stages = ", ".join(s for s in STAGES if s in row.stages)
        what = entry.summary.replace("|", "\\|")
        kind = entry.kind.name
        cells = (f"`{entry.name}`", stages, kind, row.group, law, what, f"`{entry.file}`")
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
