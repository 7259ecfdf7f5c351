"""Focused linear attention: projections in one matrix (Swin) or two (PVT), all heads in a row."""

from __future__ import annotations

from collections.abc import Iterator

from einops import rearrange

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights

NAMES = {"proj": "o_proj", "dwc": "conv", "sr": "reduce", "norm": "reduce_norm", "q": "q_proj"}


@adapter(
    "flatten-focused-linear", "flatten-focused-linear-pvt", mechanism="focused-linear-attention"
)
def focused_linear(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    heads = config["heads"]
    case.sizes(case.inputs["x"], "B _ dim")
    case.states(bias="qkv.bias" in params or "kv.bias" in params)
    layer = attlas.make(
        "focused-linear-attention", dim=config["dim"], heads=heads, grid=(config["h"], config["w"]),
        power=config["p"], kernel_size=config["ks"], reduction=config.get("sr", 1),
    )  # fmt: skip
    weights = {
        "channel_scale": rearrange(params["scale"], "1 1 (h d) -> h 1 d", h=heads),
        "key_places": rearrange(params["positional_encoding"], "1 n (h d) -> h n d", h=heads),
    }
    for name, weight in params.items():
        module, _, part = name.partition(".")
        if module in ("qkv", "kv"):
            for letter, each in zip(module, weight.chunk(len(module)), strict=True):
                weights[f"{letter}_proj.{part}"] = each
        elif module not in ("scale", "positional_encoding"):
            weights[f"{NAMES[module]}.{part}"] = weight
    load_weights(layer, weights)
    yield case.compare("out.y", layer(case.inputs["x"]))
