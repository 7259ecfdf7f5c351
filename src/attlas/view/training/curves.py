"""What the picture and the page draw: losses and scores by step, and scores against costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attlas.train.summary import Column, Spread, Summary, spread
from attlas.view.curves import COLOURS, INK

#: Points that a drawn curve has at most; losses of neighbouring steps are averaged.
DRAWN = 60
PLAIN = "softmax"


@dataclass(frozen=True, slots=True)
class Curve:
    """A mechanism's mean over seeds by step, and the range of the seeds around it."""

    mechanism: str
    colour: str
    x: tuple[float, ...]
    y: tuple[Spread, ...]


def colours(summary: Summary) -> dict[str, str]:
    """One colour a mechanism; plain softmax in grey."""
    others = iter(COLOURS * len(summary.table))
    return {name: INK if name == PLAIN else next(others) for name in summary.table}


def losses(summary: Summary) -> list[Curve]:
    """Training losses, as far as all of a mechanism's seeds have come."""
    return list(_curves(summary, "curve", 1.0))


def scores(summary: Summary) -> list[Curve]:
    """Scores on the first split, in the shown unit."""
    return list(_curves(summary, "score_curve", summary.task.judged.scale))


def _curves(summary: Summary, key: str, scale: float) -> Iterator[Curve]:
    for name, colour in colours(summary).items():
        runs = [line[key] for line in summary.of(name) if line[key]]
        if not runs:
            continue
        shortest = min(runs, key=len)
        block = -(-len(shortest) // DRAWN)
        x, y = [], []
        for begin in range(0, len(shortest), block):
            part = [run[begin : min(begin + block, len(shortest))] for run in runs]
            x.append(float(part[0][-1][0]))
            y.append(spread(scale * sum(v for _, v in run) / len(run) for run in part))
        yield Curve(name, colour, tuple(x), tuple(y))


def costs(summary: Summary) -> list[Column]:
    """The columns that scores are drawn against."""
    wanted = ("operations", "cache_bytes_per_token", "parameters", "step_ms")
    return [c for c in summary.columns if c.key in wanted]


def points(summary: Summary, cost: Column) -> list[tuple[str, str, float, Spread]]:
    """Mechanism, colour, cost and score on the first split, in the shown units."""
    found = []
    scale = summary.task.judged.scale
    for name, colour in colours(summary).items():
        row = summary.table[name]
        x, y = row[cost.key], row[f"score {summary.task.splits[0]}"]
        if isinstance(x, Spread) and isinstance(y, Spread):
            y = Spread(scale * y.mean, None, scale * y.low, scale * y.high)
            found.append((name, colour, cost.scale * x.mean, y))
    return found
