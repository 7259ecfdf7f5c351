"""How NATTEN's dilated neighbourhood attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from attlas.contract.cases import Case, Check, adapter
from attlas.modules.dilated_neighborhood import DilatedNeighborhood
from reference.neighborhood import neighborhood_case


@adapter("na1d-dilated", mechanism="dilated-neighborhood-attention")
@adapter("na2d-dilated", mechanism="dilated-neighborhood-attention")
def dilated(case: Case) -> Iterator[Check]:
    """The pattern, and what the module makes of heads; a line is a map of one row."""
    yield from neighborhood_case(case, _heads, stride=1, is_causal=False)


def _heads(
    q: Tensor, k: Tensor, v: Tensor, shape: Any, window: Any, dilation: Any
) -> dict[str, Tensor]:
    row = (1,) * (2 - len(shape))
    heads, width = q.shape[1], q.shape[3]
    module = DilatedNeighborhood(
        heads * width, heads=heads, bias=False, window=(*row, *window), dilation=(*row, *dilation)
    )
    return {"the module's heads": module.attend(q, k, v, (*row, *shape))}
