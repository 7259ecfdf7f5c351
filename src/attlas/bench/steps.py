"""One decoding step over a cache, in the forms that caches have; what its bytes are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attlas.ops.pages import best_pages, page_bounds, page_scores
from attlas.ops.segments import Dense, Listed

#: Tokens beside the pages that a query chooses, and 1/SHARE of the pages is chosen.
RECENT, SHARE = 64, 8


@dataclass
class Step:
    """A candidate over one cache: what it reads, and the bytes of that."""

    segments: Callable[[Tensor], list[Any]]
    nbytes: int


def still(*segments: Any) -> Step:
    """A step that reads the same segments for every query."""
    return Step(lambda q: list(segments), sum(s.nbytes for s in segments))


def pages(k: Tensor, v: Tensor, page: int) -> Step:
    """Score all pages, choose 1/SHARE of them, attend to those and to the latest tokens."""
    old, recent = (Dense(k[:, :, s], v[:, :, s]) for s in (slice(-RECENT), slice(-RECENT, None)))
    low, high = (x.contiguous() for x in page_bounds(old.k, page))
    count = k.shape[2] // SHARE // page

    def segments(q: Tensor) -> list[Any]:
        index = best_pages(page_scores(q, low, high), count)
        return [Listed(old.k, old.v, index, page), recent]

    listed = k[:, :, : count * page].nbytes + v[:, :, : count * page].nbytes
    return Step(segments, low.nbytes + high.nbytes + listed + recent.nbytes)
