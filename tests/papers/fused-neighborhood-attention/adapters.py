"""How NATTEN's neighbourhood attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from attlas.contract.cases import Case, Check, adapter
from attlas.ops.fused_neighborhood import FORMS, fused_neighborhood
from reference.neighborhood import neighborhood_case


@adapter("na1d", mechanism="fused-neighborhood-attention")
@adapter("na1d-causal", mechanism="fused-neighborhood-attention")
@adapter("na2d", mechanism="fused-neighborhood-attention")
@adapter("na2d-causal", mechanism="fused-neighborhood-attention")
def neighbours(case: Case) -> Iterator[Check]:
    """The pattern, and the output of both forms; these kernels know no stride but 1."""
    yield from neighborhood_case(case, _by_forms, stride=1)


def _by_forms(q: Tensor, k: Tensor, v: Tensor, **grid: Any) -> dict[str, Tensor]:
    return {form: fused_neighborhood(q, k, v, form=form, **grid) for form in FORMS}
