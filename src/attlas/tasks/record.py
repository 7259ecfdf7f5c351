"""What a task returns: a number, how many samples stand behind it, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Measure:
    """One measured number.

    Attributes:
        value: the number, in the unit of its metric.
        n: how many samples (questions, tokens, repeated runs) it is made of.
        low: lower end of its 95 % interval; None where nothing was sampled.
        high: upper end.
        floor: what the machine's own limits allow at best; None where no law is known.
        sd: standard deviation of the samples, so that means of several cells can be pooled.
        by_head: the number of each head, layer by layer; None where heads have none of their own.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    sd: float | None = None
    by_head: tuple[tuple[float, ...], ...] | None = None


def share(hits: int, n: int) -> Measure:
    """A share of successes with Wilson's 95 % score interval, which is honest at 0 and n.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), after Wilson (1927).
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"hits must be between 0 and n and n positive, got {hits} of {n}")
    p, z2 = hits / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Measure(p, n, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))


def hits(values: Sequence[bool]) -> Measure:
    """The share of successes among yes and no."""
    return share(sum(values), len(values))


def mean(values: Sequence[float]) -> Measure:
    """A mean with mean ± 1.96 standard errors; the samples are taken as independent."""
    n = len(values)
    if n < 1:
        raise ValueError("values must hold at least one number")
    middle = math.fsum(values) / n
    if n == 1:
        return Measure(middle, 1)
    sd = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1))
    half = Z95 * sd / math.sqrt(n)
    return Measure(middle, n, middle - half, middle + half, sd=sd)


def fraction(values: Sequence[float]) -> Measure:
    """The mean of numbers in [0, 1]; its interval is cut to that range."""
    return _within(mean(values))


def pooled_share(cells: Sequence[tuple[float, int]]) -> Measure:
    """One share from the (share, n) of several cells."""
    return share(sum(round(value * n) for value, n in cells), sum(n for _, n in cells))


def pooled_fraction(cells: Sequence[tuple[float, int, float]]) -> Measure:
    """One mean from the (mean, n, standard deviation) of several cells, exactly as of all samples."""
    n = sum(count for _, count, _ in cells)
    middle = math.fsum(value * count for value, count, _ in cells) / n
    squares = math.fsum((c - 1) * sd**2 + c * (value - middle) ** 2 for value, c, sd in cells)
    if n == 1:
        return Measure(middle, 1)
    sd = math.sqrt(squares / (n - 1))
    half = Z95 * sd / math.sqrt(n)
    return _within(Measure(middle, n, middle - half, middle + half, sd=sd))


def _within(found: Measure) -> Measure:
    """Cut to [0, 1]; samples that are all alike say nothing about their spread."""
    if found.low is None or found.high is None or not found.sd:
        return replace(found, low=None, high=None)
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def median(values: Sequence[float], floor: float | None = None) -> Measure:
    """The median of repeated runs, with the smallest and the largest as its ends."""
    if not values:
        raise ValueError("values must hold at least one number")
    ordered = sorted(values)
    half = len(ordered) // 2
    middle = ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return Measure(middle, len(ordered), ordered[0], ordered[-1], floor)
