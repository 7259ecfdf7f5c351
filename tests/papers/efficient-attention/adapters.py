"""Efficient attention: 1 × 1 convolutions over a picture, whose sum with its input is returned."""

from __future__ import annotations

from collections.abc import Iterator

from einops import rearrange

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights

NAMES = {"keys": "k_proj", "queries": "q_proj", "values": "v_proj", "reprojection": "o_proj"}


@adapter("efficient-attention", mechanism="efficient-attention")
def efficient(case: Case) -> Iterator[Check]:
    config, x = case.config, case.inputs["x"]
    heads = config["heads"]
    case.sizes(x, "batch in_channels height width")
    layer = attlas.make(
        "efficient-attention", dim=config["in_channels"], heads=heads, bias=True,
        head_dim=config["key_channels"] // heads, value_dim=config["value_channels"] // heads,
    )  # fmt: skip
    weights = {}
    for name, weight in case.params.items():
        theirs, kind = name.split(".")
        weights[f"{NAMES[theirs]}.{kind}"] = weight.flatten(1) if kind == "weight" else weight
    load_weights(layer, weights)
    y = layer(rearrange(x, "b c h w -> b (h w) c"))
    yield case.compare("out.y", x + rearrange(y, "b (h w) c -> b c h w", h=x.shape[2]))
