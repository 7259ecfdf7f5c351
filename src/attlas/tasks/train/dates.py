"""Dates as people write them, turned into one form, sign by sign.

    "the 3rd of may, 1998"  ⟶  "1998-05-03"

Vocabulary: digits, letters, space and `-./,`. A day between 1900 and 2099 is drawn and written in
one of seven ways, all of which name day and month without doubt. Scored: every sign of the answer
and its end, the right ones before it being given. Ceiling: 100 %.
"""

from __future__ import annotations

from datetime import date, timedelta

from torch import Generator

from attlas.tasks.train.base import Batch, Sizes, Task, integers, task
from attlas.tasks.train.spelling import COUNT, translation

_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
    "november", "december",
)  # fmt: skip
_FIRST = date(1900, 1, 1)
_DAYS = (date(2100, 1, 1) - _FIRST).days


@task("dates", needs="seq2seq")
class Dates(Task):
    """Dates to ISO 8601."""

    @property
    def sizes(self) -> Sizes:
        """Room for "the 22nd of september, 1998"."""
        return Sizes(outputs=COUNT, length=32, source=COUNT)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Days, each in a way of its own."""
        days = integers(rng, 0, _DAYS, rows).tolist()
        ways = integers(rng, 0, 7, rows).tolist()
        drawn = [_FIRST + timedelta(days=day) for day in days]
        return translation(
            [written(day, way) for day, way in zip(drawn, ways, strict=True)],
            [day.isoformat() for day in drawn],
        )


def written(day: date, way: int) -> str:
    """A day in one of seven ways."""
    d, y, month = day.day, day.year, _MONTHS[day.month - 1]
    return (
        f"{d} {month} {y}",
        f"{month} {d}, {y}",
        f"the {_ordinal(d)} of {month}, {y}",
        f"{_ordinal(d)} {month[:3]}. {y}",
        f"{month[:3]} {d:02d} {y}",
        f"{y}, {month} {_ordinal(d)}",
        f"{d}-{month[:3]}-{y}",
    )[way]


def _ordinal(d: int) -> str:
    end = "th" if d in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(d % 10, "th")
    return f"{d}{end}"
