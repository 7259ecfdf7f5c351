"""How the published layer's weights and configuration map to ours."""

from __future__ import annotations

import re
from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.positions import RoPE


@adapter("differential", mechanism="differential-transformer")
def differential(case: Case) -> Iterator[Check]:
    config = case.config
    position = None
    if "cos" in case.inputs:
        base = re.search(r"base (\d+)", str(config.get("rope", "")))
        position = RoPE(config["head_dim"], float(base[1]) if base else 1e4, interleaved=True)
    layer = attlas.make(
        "differential-transformer", dim=config["embed_dim"], heads=config["num_heads"],
        kv_heads=config.get("num_kv_heads") or config["num_heads"], head_dim=config["head_dim"],
        depth=config["depth"], causal=config.get("causal", True), position=position,
        pairing="repeated",
    )  # fmt: skip
    layer.norm.eps = config.get("subln_eps", 1e-5)
    renamed = {"out_proj": "o_proj", "subln": "norm"}
    weights = {}
    for name, weight in case.params.items():
        first, dot, rest = name.partition(".")
        weights[renamed.get(first, first) + dot + rest] = weight
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "heads_before_norm" in case.mids:
        yield case.compare("mid.heads_before_norm", layer.attend(*layer.prepare(x)))
    if "lambda_full" in case.mids:
        theirs = case.mids["lambda_full"]
        yield case.compare("mid.lambda_full", layer.lambda_.expand(theirs.shape))
