"""How the published position-aware temperature maps to ours; nothing of the token's was published."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("selective-self-attention-position", mechanism="selective-self-attention")
def selective(case: Case) -> Iterator[Check]:
    config = case.config
    layer = attlas.make(
        "selective-self-attention", dim=config["n_embd"], heads=config["n_head"],
        bias=config.get("bias", False), causal=config.get("causal", True),
    )  # fmt: skip
    weights = {"beta": case.params["beta"].reshape(())}
    for gate in ("query_gate", "value_gate"):
        weights[gate] = torch.zeros_like(layer.get_parameter(gate))
    for kind in ("weight", "bias"):
        if f"c_attn.{kind}" in case.params:
            for name, part in zip("qkv", case.params[f"c_attn.{kind}"].chunk(3), strict=True):
                weights[f"{name}_proj.{kind}"] = part
        if f"c_proj.{kind}" in case.params:
            weights[f"o_proj.{kind}"] = case.params[f"c_proj.{kind}"]
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x))
