"""How the published policy by observed attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attlas.contract.cases import Case, Check, adapter
from attlas.parts.evict.observed_attention import ObservedAttention
from reference.model import on_model
from reference.policies import press


def observed(config: dict[str, Any]) -> ObservedAttention:
    return ObservedAttention(1.0 - config["compression_ratio"])


@adapter("press-observed", mechanism="observed-attention")
def one_layer(case: Case) -> Iterator[Check]:
    return press(case, observed(case.config))


@adapter("model-observed-attention", mechanism="observed-attention")
def whole_model(case: Case) -> Iterator[Check]:
    return on_model(case, observed)
