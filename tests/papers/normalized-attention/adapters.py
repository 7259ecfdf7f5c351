"""How the published normalized attention's weights and configurations map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("normalized-attention", mechanism="normalized-attention")
def normalized(case: Case) -> Iterator[Check]:
    config = case.config
    norm = config.get("hidden_layer_norm", False)
    layer = attlas.make(
        "normalized-attention", dim=config["dim"], heads=config["heads"],
        causal=config.get("causal", False), eps=config.get("epsilon", 1e-3), bias=True, norm=norm,
        divided=config.get("logit_rescale", False), nonlinearity=config.get("hidden_gelu", False),
    )  # fmt: skip
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "mix"}
    weights = {f"{ours}.weight": case.params[f"{theirs}_w"].T for ours, theirs in names.items()}
    weights |= {f"{ours}.bias": case.params[f"{theirs}_b"] for ours, theirs in names.items()}
    weights |= {"gain": case.params["gain"][0], "shift": case.params["bias"][0]}
    if norm:
        for name in case.params:
            for theirs, ours in {"gamma": "weight", "beta": "bias"}.items():
                if name.endswith(theirs):
                    weights[f"norm.{ours}"] = case.params[name]
    load_weights(layer, weights)
    valid = case.inputs.get("mask")
    yield case.compare("out.y", layer(case.inputs["x"], mask=None if valid is None else valid > 0))
