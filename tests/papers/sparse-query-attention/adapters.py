"""How the authors' sparse query attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from reference.rope import rope_of


@adapter("sqa", mechanism="sparse-query-attention")
def sqa(case: Case) -> Iterator[Check]:
    config = case.config
    width = config.get("head_dim") or config["embed_dim"] // config["num_heads"]
    layer = attlas.make(
        "sqa", dim=config["embed_dim"], heads=config["num_heads"], head_dim=width,
        query_heads=config["num_query_heads"], kv_heads=config["num_kv_heads"], bias=True,
        causal=config.get("causal", False),
        position=rope_of(config.get("rope"), width, interleaved=True),
    )  # fmt: skip
    case.states(bias="q_proj.bias" in case.params)
    load_weights(layer, {k.replace("out_proj", "o_proj"): v for k, v in case.params.items()})
    visible = case.inputs.get("key_visible")
    yield case.compare("out.y", layer(case.inputs["x"], mask=None if visible is None else visible > 0))
