"""What the picture and the page draw: quality against a cost, one curve for each family."""

from __future__ import annotations

from dataclasses import dataclass

from attlas.compare.methods import FULL
from attlas.compare.summary import Summary, budget, family
from attlas.tasks.compare.base import SECTIONS, Metric
from attlas.tasks.record import Measure

#: Colours that colour-blind readers can tell apart, after Okabe and Ito.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f6bd0", "#8a8a00")
INK = "#888888"


@dataclass(frozen=True, slots=True)
class Point:
    """A method in the plane: cost to the right, quality upwards."""

    method: str
    budget: str
    x: float
    y: Measure


@dataclass(frozen=True, slots=True)
class Curve:
    """The methods of one family in the order of their cost."""

    family: str
    colour: str
    points: tuple[Point, ...]


def costs(summary: Summary) -> list[Metric]:
    """What stands on the horizontal axis, that of the picture first."""
    found = [m for m in summary.columns if m.drawn and not m.quality]
    return sorted(found, key=lambda m: m.drawn != "picture")


def qualities(summary: Summary) -> list[Metric]:
    """What stands on the vertical axis; of each section that of the picture first."""
    found = [m for m in summary.columns if m.drawn and m.quality]
    return sorted(found, key=lambda m: (SECTIONS.index(m.section), m.drawn != "picture"))


def curves(summary: Summary, cost: Metric, quality: Metric) -> list[Curve]:
    """A curve for each family; methods of which one of the two is missing are left out."""
    families: dict[str, list[Point]] = {}
    for method in summary.grid.methods:
        row = summary.table[method.label]
        x, y = row.get(cost.key), row.get(quality.key)
        points = families.setdefault(family(method), [])
        if isinstance(x, Measure) and isinstance(y, Measure):
            points.append(
                Point(method.label, budget(method), cost.scale * x.value, _scaled(quality, y))
            )
    colours = iter(COLOURS * len(families))
    return [
        Curve(
            name, INK if name == FULL else next(colours), tuple(sorted(points, key=lambda p: p.x))
        )
        for name, points in families.items()
    ]


def _scaled(column: Metric, y: Measure) -> Measure:
    low = y.value if y.low is None else y.low
    high = y.value if y.high is None else y.high
    return Measure(column.scale * y.value, y.n, column.scale * low, column.scale * high)
