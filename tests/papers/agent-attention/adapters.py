"""Agent attention as in PVT: keys and values in one matrix, biases with the agents last for queries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights

NAMES = {"q": "q_proj", "proj": "o_proj", "dwc": "conv", "sr": "reduce", "norm": "reduce_norm"}


@adapter("agent-attention", mechanism="agent-attention")
def agent_attention(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    dim = config["dim"]
    case.sizes(case.inputs["x"], "B _ dim")
    case.states(bias="q.bias" in params)
    layer = attlas.make(
        "agent-attention", dim=dim, heads=config["heads"], grid=(config["h"], config["w"]),
        agents=config["agents"], reduction=config["sr"], kernel_size=params["dwc.weight"].shape[-1],
    )  # fmt: skip
    weights = {f"{letter}_proj.bias": torch.zeros(dim) for letter in "qkv"}  # `bias` may be off
    weights |= {
        "gather_bias.picture": params["an_bias"],
        "gather_bias.rows": params["ah_bias"][0],
        "gather_bias.columns": params["aw_bias"][0],
        "spread_bias.picture": params["na_bias"],
        "spread_bias.rows": rearrange(params["ha_bias"], "1 n h w a -> n a h w"),
        "spread_bias.columns": rearrange(params["wa_bias"], "1 n h w a -> n a h w"),
    }
    for name, weight in params.items():
        module, _, part = name.partition(".")
        if module == "kv":
            weights[f"k_proj.{part}"], weights[f"v_proj.{part}"] = weight.chunk(2)
        elif not module.endswith("_bias"):
            weights[f"{NAMES[module]}.{part}"] = weight
    load_weights(layer, weights)
    yield case.compare("out.y", layer(case.inputs["x"]))
