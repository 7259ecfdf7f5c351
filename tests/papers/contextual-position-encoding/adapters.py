"""How the published layer's weights and configuration map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
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
    if config.get("separate_gate_keys"):
        k = torch.cat((k, case.inputs["k_gate"][:, None]), dim=-1)
    elif config.get("value_gates"):
        k = torch.cat((k, v), dim=-1)
    mask = case.inputs.get("mask")
    inputs = layer.prepare(q[:, 0])[-1]
    weights = layer.weigh(q, k, None if mask is None else mask[:, None].bool(), inputs)
    yield case.compare("out.y", layer.aggregate(weights, v)[:, 0])
    if "weights" in case.mids:
        yield case.compare("mid.weights", weights[:, 0])
