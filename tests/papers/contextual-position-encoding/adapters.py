"""How the published layer's weights and configuration map to ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from einops import rearrange

import attlas
from attlas.contract.cases import Case, Check, adapter


@adapter("cope", mechanism="contextual-position-encoding")
def cope(case: Case) -> Iterator[Check]:
    """The published layer is a function of one head's queries, keys and values."""
    config = case.config
    width = config["head_dim"]
    layer = attlas.make(
        "cope", dim=width, heads=1, npos=config["npos_max"],
        gate_keys=config.get("separate_gate_keys", False),
        value_gates=config.get("value_gates", False),
        undivided=config.get("position_logits_undivided", False),
    )  # fmt: skip
    q, k, v = (rearrange(case.inputs[name], "b t d -> b 1 t d") for name in "qkv")
    layer.to(q.dtype).embedding.copy_(rearrange(case.params["pos_emb"], "1 d n -> n d"))
    mask = case.inputs.get("mask")
    pairs = None if mask is None else mask[:, None].bool()
    case.states(causal=pairs is not None and not bool(pairs.triu(1).any()))
    inputs = replace(layer.prepare(q[:, 0])[-1], pairs=pairs)
    if config.get("separate_gate_keys"):
        inputs.carry("gates", case.inputs["k_gate"][:, None])
    else:
        case.without_effect("in.k_gate")
    if config.get("value_gates"):
        inputs.carry("gates", v)
    weights = layer.weigh(q, k, inputs)
    yield case.compare("out.y", layer.aggregate(weights, v, inputs)[:, 0])
    if "weights" in case.mids:
        yield case.compare("mid.weights", weights[:, 0])
