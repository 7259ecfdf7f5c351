"""How the published layer's weights and configuration map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("sinkformer", mechanism="sinkformer")
def sinkformer(case: Case) -> Iterator[Check]:
    config = case.config
    layer = attlas.make(
        "sinkformer", dim=config["dim"], heads=config["heads"], head_dim=config["dim_head"],
        half_steps=config["max_iter"], epsilon=float(config["eps"]), bias=True,
        causal=config.get("causal", False),
    )  # fmt: skip
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    projections = case.params["to_qkv.weight"]
    weights = dict(zip(names, projections.chunk(3), strict=True))
    # A single head as wide as the layer has no output projection there.
    same = torch.eye(config["dim"], dtype=projections.dtype)
    weights["o_proj.weight"] = case.params.get("to_out.0.weight", same)
    if "to_out.0.bias" in case.params:
        weights["o_proj.bias"] = case.params["to_out.0.bias"]
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x))
