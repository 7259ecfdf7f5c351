"""NaLaFormer's published layer over a picture."""

from __future__ import annotations

from collections.abc import Iterator

from attlas.contract.cases import Case, Check, adapter
from reference.grid import gated_on_grid


@adapter("nalaformer", mechanism="nalaformer")
def nalaformer(case: Case) -> Iterator[Check]:
    return gated_on_grid(case)
