"""Local linear attention by its successor Parallax: a slope that is given, and one that is solved for."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas import masks, ops
from attlas.contract.cases import Case, Check, adapter
from attlas.inputs import Inputs
from attlas.layers.linear.local_linear import sloped


@adapter("parallax-local-linear", mechanism="local-linear-attention")
def parallax_local_linear(case: Case) -> Iterator[Check]:
    config = case.config
    q, k, v, r = (case.inputs[name].double() for name in "qkvr")
    heads, tokens, width = q.shape[1:]
    case.sizes(q, "batch query_heads length head_dim")
    case.states(kv_heads=k.shape[1])
    window = config.get("window")
    pattern = masks.causal if window is None else masks.causal & masks.window(window)
    scaling = config.get("scale", "D**-0.5")
    scale = width**-0.5 if isinstance(scaling, str) or scaling is None else float(scaling)
    plain = {"scale": scale, "mask": pattern, "score_mod": None, "q_offset": 0}
    p = ops.softmax(ops.scores_of(q, k, **plain))
    yield case.compare("out.o", ops.grouped_product(sloped(p, k, r), v))
    if "o_ridge" not in case.outs:
        case.without_effect("config.ridge", "in.r_ridge")
        return
    given = ops.grouped_product(sloped(p, k, case.inputs["r_ridge"].double()), v)
    yield case.compare("out.o_ridge", given)._replace(name="out.o_ridge, its slope given")
    layer = attlas.make(
        "local-linear-attention", dim=heads * width, heads=heads, kv_heads=k.shape[1],
        head_dim=width, ridge=config["ridge"], relative=True,
    )  # fmt: skip
    layer.scale = scale
    at = torch.arange(tokens)
    inputs = Inputs(torch.zeros(len(q), tokens, heads * width), None, at, at, pairs=pattern)
    yield case.compare("out.o_ridge", layer.attend(q, k, v, inputs))
