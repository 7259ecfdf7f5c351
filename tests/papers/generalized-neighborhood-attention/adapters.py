"""How NATTEN's strided windows map to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from attlas.contract.cases import Case, Check, adapter
from attlas.ops.generalized_neighborhood import generalized_neighborhood
from reference.neighborhood import neighborhood_case


@adapter("gna1d-strided", mechanism="generalized-neighborhood-attention")
@adapter("gna2d-strided", mechanism="generalized-neighborhood-attention")
def strided(case: Case) -> Iterator[Check]:
    """The pattern, and the output of both routes."""
    yield from neighborhood_case(case, _by_routes)


def _by_routes(q: Tensor, k: Tensor, v: Tensor, **grid: Any) -> dict[str, Tensor]:
    routes = ("auto", "dense", "tiles")
    return {r: generalized_neighborhood(q, k, v, route=r, **grid) for r in routes}
