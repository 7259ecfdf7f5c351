"""What a study expects of its numbers, and the one rule by which they decide over its claim.

Numbers are means over seeds; two of them differ if they lie more than two standard errors of their
difference apart. The first expectation is the claim itself, the others what belongs to it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

Answer: TypeAlias = Literal["yes", "some", "no"]
Verdict: TypeAlias = Literal["holds", "partly", "does not hold here"]
#: Every verdict, the best one first.
VERDICTS: tuple[Verdict, ...] = ("holds", "partly", "does not hold here")


class Row(NamedTuple):
    """One measured number of one seed.

    Attributes:
        name: of what was measured.
        value: of it.
        unit: that tables show behind it; "" for a number without one.
        better: "higher" or "lower".
        at: where on an axis it was measured, a length or a width say; rows of one name are a curve.
    """

    name: str
    value: float
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"
    at: float | None = None

    @property
    def label(self) -> str:
        """Name and place, by which expectations and tables know it."""
        return self.name if self.at is None else f"{self.name} at {self.at:g}"


def by_label(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each label, one a seed, in the order in which labels first stand."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.label, []).append(row)
    return found


@runtime_checkable
class Expectation(Protocol):
    """One sentence about the rows that is so, is so in part, or is not."""

    def answer(self, rows: Sequence[Row]) -> Answer:
        """What the rows say to it."""

    def contradicted(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows with numbers that clearly say no to it."""

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Beats:
    """`ours` is better than `theirs`: "some" where by two standard errors or less."""

    ours: str
    theirs: str

    def answer(self, rows: Sequence[Row]) -> Answer:
        """By the means, and the standard error of their difference."""
        mine, theirs = _values(rows, self.ours), _values(rows, self.theirs)
        gap = _sign(rows, self.ours) * (statistics.mean(mine) - statistics.mean(theirs))
        error = math.sqrt(variance(mine) / len(mine) + variance(theirs) / len(theirs))
        return "yes" if gap > 2 * error and gap > 0 else "some" if gap > 0 else "no"

    def contradicted(self, rows: Sequence[Row]) -> list[Row]:
        """Ours worse than theirs by more than theirs is large."""
        theirs = statistics.mean(_values(rows, self.theirs))
        return _put(rows, self.ours, theirs - _sign(rows, self.ours) * (1 + abs(theirs)))

    def __str__(self) -> str:
        return f"{self.ours} beats {self.theirs}"


@dataclass(frozen=True)
class NoWorse:
    """`ours` is worse than `theirs` by at most a share `margin` of theirs."""

    ours: str
    theirs: str
    margin: float

    def answer(self, rows: Sequence[Row]) -> Answer:
        """By the means alone: the margin is what is allowed."""
        rival = statistics.mean(_values(rows, self.theirs))
        gap = _sign(rows, self.ours) * (statistics.mean(_values(rows, self.ours)) - rival)
        return "yes" if gap + self.margin * abs(rival) >= 0 else "no"

    def contradicted(self, rows: Sequence[Row]) -> list[Row]:
        """Ours beyond the margin."""
        theirs = statistics.mean(_values(rows, self.theirs))
        worse = 1 + (1 + self.margin) * abs(theirs)
        return _put(rows, self.ours, theirs - _sign(rows, self.ours) * worse)

    def __str__(self) -> str:
        return f"{self.ours} is no worse than {self.theirs} by more than {self.margin:.0%}"


@dataclass(frozen=True)
class Within:
    """`name` lies between two bounds: "some" where its mean does, but not that of every seed."""

    name: str
    least: float = -math.inf
    most: float = math.inf

    def answer(self, rows: Sequence[Row]) -> Answer:
        """By every seed, then by the mean."""
        values = _values(rows, self.name)
        if all(self.least <= value <= self.most for value in values):
            return "yes"
        return "some" if self.least <= statistics.mean(values) <= self.most else "no"

    def contradicted(self, rows: Sequence[Row]) -> list[Row]:
        """Beyond the bound that there is."""
        if math.isfinite(self.most):
            return _put(rows, self.name, self.most + 1 + abs(self.most))
        return _put(rows, self.name, self.least - 1 - abs(self.least))

    def __str__(self) -> str:
        least = f"at least {self.least:g}" if math.isfinite(self.least) else ""
        most = f"at most {self.most:g}" if math.isfinite(self.most) else ""
        return f"{self.name} is {' and '.join(filter(None, (least, most)))}"


def verdict(answers: Sequence[Answer]) -> Verdict:
    """All yes: the claim holds; the first no: it does not; else partly."""
    if not answers:
        raise ValueError("a study needs at least one expectation")
    if all(answer == "yes" for answer in answers):
        return "holds"
    return "does not hold here" if answers[0] == "no" else "partly"


def variance(values: Sequence[float]) -> float:
    """Of a sample; 0 of one number."""
    return statistics.variance(values) if len(values) > 1 else 0.0


def _rows(rows: Sequence[Row], label: str) -> list[Row]:
    found = by_label(rows)
    if label not in found:
        raise ValueError(f"no row is called {label!r}; there are {sorted(found)}")
    return found[label]


def _values(rows: Sequence[Row], label: str) -> list[float]:
    return [row.value for row in _rows(rows, label)]


def _sign(rows: Sequence[Row], label: str) -> float:
    return 1.0 if _rows(rows, label)[0].better == "higher" else -1.0


def _put(rows: Sequence[Row], label: str, value: float) -> list[Row]:
    return [row._replace(value=value) if row.label == label else row for row in rows]
