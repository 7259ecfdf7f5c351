"""How the published layer's weights and configuration map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("qk-norm", mechanism="qk-norm")
def qk_norm(case: Case) -> Iterator[Check]:
    config = case.config
    context = case.inputs.get("context")
    layer = attlas.make(
        "qk-norm", dim=config["embed_dim"], heads=config["num_heads"], bias=True,
        length=config.get("seq_len_threshold", 512),
        causal=config.get("causal", False) and context is None,
    )  # fmt: skip
    case.states(bias="biases" in case.params, cross=context is not None)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = {"g": case.params["mha_scale.scale"]}
    for name, weight in zip(names, case.params["weights"].chunk(4), strict=True):
        weights[f"{name}.weight"] = weight
    if "biases" in case.params:
        for name, bias in zip(names, case.params["biases"].chunk(4), strict=True):
            weights[f"{name}.bias"] = bias
    load_weights(layer, weights)
    hidden = case.inputs.get("key_padding")
    mask = None if hidden is None else hidden == 0
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x, context, mask=mask))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x, context, mask=mask))
