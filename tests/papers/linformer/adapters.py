"""Linformer: the published projections act on the length from the left, ours as the paper writes them."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("linformer", mechanism="linformer")
def linformer(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    heads, shared = config["heads"], config["share_kv"]
    layer = attlas.make(
        "linformer", dim=config["dim"], heads=heads, head_dim=config["dim_head"], bias=True,
        kv_heads=1 if config["one_kv_head"] else heads, rank=config["k"],
        max_length=config["seq_len"], share_kv=shared,
    )  # fmt: skip
    x, context = case.inputs["x"], case.inputs.get("context")
    case.sizes(x, "batch length dim")
    case.states(context_length=None if context is None else context.shape[1])
    weights = {f"{n}_proj.weight": params[f"to_{n}.weight"] for n in "qk"}
    # Theirs takes the keys for values too, where it shares.
    weights["v_proj.weight"] = params["to_k.weight" if shared else "to_v.weight"]
    weights |= {f"o_proj.{n}": params[f"to_out.{n}"] for n in ("weight", "bias")}
    weights["projection.keys"] = params["proj_k"].mT[None]
    weights["projection.values"] = params["proj_k" if shared else "proj_v"].mT[None]
    load_weights(layer, weights)
    yield case.compare("out.y", layer(x, context))
