"""How the published layer's weights and configuration map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("multi-query", mechanism="multi-query-attention")
def multi_query(case: Case) -> Iterator[Check]:
    config = case.config
    layer = attlas.make(
        "multi-query-attention", dim=config["embed_dim"], heads=config["num_heads"],
        head_dim=config["head_dim"], causal=config.get("causal", False), bias=True,
    )  # fmt: skip
    case.states(bias="q_proj.bias" in case.params)
    load_weights(layer, {k.replace("out_proj", "o_proj"): v for k, v in case.params.items()})
    yield case.compare("out.y", layer(case.inputs["x"], case.inputs.get("context")))
