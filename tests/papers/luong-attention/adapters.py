"""Luong attention: OpenNMT's joined state has the query first."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("luong-dot", "luong-general", "additive-global", mechanism="luong-attention")
def luong(case: Case) -> Iterator[Check]:
    config, params, x = case.config, case.params, case.inputs["query"]
    memory, scoring = case.inputs["memory"], config["attn_type"].replace("mlp", "concat")
    layer = attlas.make(
        "luong-attention", dim=config["tgt_dim"], context_dim=config["src_dim"], scoring=scoring,
        score_dim=config["attn_dim"], bias="linear_out.bias" in params,
    )  # fmt: skip
    weights = {"o_proj.weight": params["linear_out.weight"].roll(config["src_dim"], dims=1)}
    names = {"linear_in": "q_proj", "linear_query": "q_proj", "linear_context": "k_proj",
             "v": "v_score"}  # fmt: skip
    for theirs, ours in names.items():
        if f"{theirs}.weight" in params:
            weights[f"{ours}.weight"] = params[f"{theirs}.weight"]
    if "linear_out.bias" in params:
        weights["o_proj.bias"] = params["linear_out.bias"]
    load_weights(layer, weights)
    mask = None
    if "memory_visible" in case.inputs:
        mask = case.inputs["memory_visible"] != 0
    elif "memory_lengths" in case.inputs:
        mask = torch.arange(memory.shape[1]) < case.inputs["memory_lengths"][:, None]
    yield case.compare("out.y", layer(x, memory, mask=mask))
    found = layer.weights(x, memory, mask=mask)
    yield case.compare("out.weights", found[:, 0])
    if "context" in case.mids:
        inputs = layer.prepare(x, memory, mask)[-1]
        context = layer.aggregate(found, memory[:, None], inputs)
        yield case.compare("mid.context", context[:, 0])
