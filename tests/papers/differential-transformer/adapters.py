"""How the published layer's weights and configuration map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas.contract.cases import Case, Check, adapter, compare, load_weights
from reference.rope import rope_of


@adapter("differential", mechanism="differential-transformer")
def differential(case: Case) -> Iterator[Check]:
    config = case.config
    told = config.get("rope") or "cos" in case.inputs
    position = rope_of(told, config["head_dim"], interleaved=True)
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
    if "lambda_init" in config:
        ours, theirs = (torch.tensor(float(y)) for y in (layer.lambda_init, config["lambda_init"]))
        yield compare("config.lambda_init", ours, theirs, case.atol, case.rtol)
    if "cos" in case.inputs:
        pairs = torch.tensor([1.0, 0.0]).repeat(1, 1, x.shape[1], config["head_dim"] // 2)
        turned = position.rotate(pairs, torch.arange(x.shape[1]))[0, 0]
        yield case.compare("in.cos", turned[:, ::2])
        yield case.compare("in.sin", turned[:, 1::2])
    yield case.compare("out.y", layer(x))
    if "heads_before_norm" in case.mids:
        yield case.compare("mid.heads_before_norm", layer.attend(*layer.prepare(x)))
    if "lambda_full" in case.mids:
        theirs = case.mids["lambda_full"]
        yield case.compare("mid.lambda_full", layer.lambda_.expand(theirs.shape))
