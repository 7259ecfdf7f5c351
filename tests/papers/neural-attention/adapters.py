"""Neural attention: the authors' one projection, read channel by channel."""

from __future__ import annotations

from collections.abc import Iterator

from einops import rearrange

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("neural-attention", mechanism="neural-attention")
def neural(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    layer = attlas.make(
        "neural-attention", dim=config["dim"], heads=config["heads"], head_dim=config["head_dim"],
        projection_dim=params["q_proj.weight"].shape[0], causal=config.get("causal", True),
    )  # fmt: skip
    case.states(projection_dim=params["q_proj.weight"].shape[0])
    case.without_effect("param.linear3.bias")  # the same in all logits, which a softmax does not see
    # Its features count heads fastest, then q, k, v, then the channels of a head.
    q, k, v = rearrange(
        params["to_qkv.weight"], "(d kind h) i -> kind (h d) i", kind=3, h=config["heads"]
    )
    weights = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v}
    weights["o_proj.weight"] = params["W_out.weight"]
    renamed = {
        "q_proj": "q_narrow", "k_proj": "k_narrow", "linear1": "first", "linear2": "second",
    }  # fmt: skip
    for theirs, ours in renamed.items():
        weights |= {f"{ours}.{part}": params[f"{theirs}.{part}"] for part in ("weight", "bias")}
    weights["third.weight"] = params["linear3.weight"]
    load_weights(layer, weights)
    yield case.compare("out.y", layer(case.inputs["x"]))
