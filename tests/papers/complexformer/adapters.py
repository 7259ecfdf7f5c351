"""How the published ComplexFormer's weights map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("complexformer", mechanism="complexformer")
def complexformer(case: Case) -> Iterator[Check]:
    config = case.config
    layer = attlas.make(
        "complexformer", dim=config["d_model"], heads=config["num_heads"],
        causal=config.get("causal", False),
    )  # fmt: skip
    weights = {f"{n}_proj.weight": case.params[f"W_{n}.weight"] for n in "qkvo"}
    weights["delta"] = case.params["delta_params"]
    weights["phase_bias"] = case.params["bias_params"]
    load_weights(layer, weights)
    # The published code rounds its frequencies to bfloat16.
    frequencies = layer.position_encoding.frequencies
    if "g" in case.params:
        yield case.compare("param.g", frequencies)
    frequencies.copy_(case.inputs.get("frequencies_used", frequencies))
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x))
