"""MoSA: the authors' layer of sparse heads alone, each with matrices of its own."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, compare, load_weights


@adapter("mosa", mechanism="mosa")
def mosa(case: Case) -> Iterator[Check]:
    config, params, x = case.config, case.params, case.inputs["x"]
    case.sizes(x, "B T h")
    heads, _, joined = params["QKV.W"].shape
    case.states(n_heads=heads, h_prim=joined // 3)
    layer = attlas.make(
        "mosa", dim=config["h"], heads=heads, head_dim=config["h_prim"], dense_heads=0,
        causal=config.get("causal", True), sparsity=config["sparsity"],
        include_first=bool(config["include_first"]), rotate_fraction=config["rotate_fraction"],
        rope_base=float(config["rope_base"]),
    )  # fmt: skip
    names = [f"{name}_proj.weight" for name in "qkv"]
    parts = [part.transpose(1, 2).flatten(0, 1) for part in params["QKV.W"].chunk(3, dim=2)]
    load_weights(layer, {
        "router.weight": params["r.0.weight"], "o_proj.weight": params["O.W"].flatten(0, 1).T,
        **dict(zip(names, parts, strict=True)),
    })  # fmt: skip
    *_, inputs = layer.prepare(x)
    at, _ = layer.choice(inputs)
    case.states(selected=at.shape[2])
    if "topk_indices" in case.mids:
        theirs, order = case.mids["topk_indices"].long().sort(dim=-1)
        yield compare("mid.topk_indices", at, theirs, 0.0, 0.0)
        if "topk_values" in case.mids:
            r = inputs.carried["router"][..., 0].sigmoid().gather(-1, at)
            theirs = case.mids["topk_values"].gather(-1, order)
            yield compare("mid.topk_values", r, theirs, case.atol, case.rtol)
    yield case.compare("out.o", layer(x))
