"""RALA's published layer over a picture."""

from __future__ import annotations

from collections.abc import Iterator

from attlas.contract.cases import Case, Check, adapter
from reference.grid import gated_on_grid


@adapter("rala", mechanism="rank-augmented-linear-attention")
def rala(case: Case) -> Iterator[Check]:
    return gated_on_grid(case)
