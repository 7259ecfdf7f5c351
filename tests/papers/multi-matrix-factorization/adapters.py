"""How Step-3's multi-matrix factorization attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from reference.rope import rope_of


@adapter("multi-matrix-factorization", mechanism="multi-matrix-factorization")
def multi_matrix(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    width = config["head_dim"]
    rank = config.get("shared_query_dim", width)
    layer = attlas.make(
        "mfa", dim=config["dim"], heads=config["heads"], head_dim=width, query_rank=rank,
        query_norm="inter_norm.weight" in params, causal=config.get("causal", True),
        position=rope_of(config.get("rope"), width, interleaved=False),
    )  # fmt: skip
    names = ("q_down.weight", "k_proj.weight", "v_proj.weight")
    parts = params["qkv_proj.weight"].split((rank, width, width))
    weights = dict(zip(names, parts, strict=True))
    weights |= {"q_up.weight": params["wq.weight"], "o_proj.weight": params["o_proj.weight"]}
    if "inter_norm.weight" in params:
        weights["q_norm.weight"] = params["inter_norm.weight"]
        layer.q_norm.eps = config.get("norm_eps", 1e-5)
    else:
        case.without_effect("config.norm_eps")
    load_weights(layer, weights)
    yield case.compare("out.y", layer(case.inputs["x"]))
