"""CASTLE: a third party's layer, whose six projections are rows of one matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import rms_norm

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.positions import RoPE


@adapter("castle", mechanism="castle-lookahead-keys")
def castle(case: Case) -> Iterator[Check]:
    config = case.config
    case.states(prenorm="norm.weight" in case.params)
    position = RoPE(config["dim_head"], interleaved=True) if config.get("rotary") else None
    layer = attlas.make(
        "castle", dim=config["dim"], heads=config["heads"], head_dim=config["dim_head"],
        causal=config.get("causal", True), window=config.get("window"), position=position,
    )  # fmt: skip
    ahead, plain = case.params["to_all_qkv.weight"].chunk(2)
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    load_weights(layer, {
        "ahead_proj.weight": ahead, "o_proj.weight": case.params["combine_heads.weight"],
        **dict(zip(names, plain.chunk(3), strict=True)),
    })  # fmt: skip
    x = case.inputs["x"]
    if "norm.weight" in case.params:
        x = rms_norm(x, x.shape[-1:], case.params["norm.weight"])
    yield case.compare("out.y", layer(x))
    if "y_decode" in case.outs or "final_lookahead_keys" in case.mids:
        cache = layer.init_cache()
        steps = [layer(token, cache=cache) for token in x.split(1, dim=1)]
        if "y_decode" in case.outs:
            yield case.compare("out.y_decode", torch.cat(steps, dim=1))
        if "final_lookahead_keys" in case.mids:
            state = cache.layers[0].states["lookahead"]
            yield case.compare("mid.final_lookahead_keys", state[:, :, 0])
