"""How the published policy by expected attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attlas.contract.cases import Case, Check, adapter
from attlas.parts.evict.expected_attention import ExpectedAttention
from reference.model import on_model
from reference.policies import press


def expected_attention(config: dict[str, Any]) -> ExpectedAttention:
    return ExpectedAttention(
        1.0 - config["compression_ratio"],
        n_future=config["n_future_positions"],
        sinks=config["n_sink"],
        epsilon=float(config.get("epsilon", 0.0)),
        use_covariance=config.get("use_covariance", True),
        use_vnorm=config.get("use_vnorm", True),
    )


@adapter(
    "press-expected-attention", "press-expected-attention-mean", mechanism="expected-attention"
)
def one_layer(case: Case) -> Iterator[Check]:
    return press(case, expected_attention(case.config))


@adapter(
    "model-expected-attention", "model-expected-attention-mean", mechanism="expected-attention"
)
def whole_model(case: Case) -> Iterator[Check]:
    return on_model(case, expected_attention)
