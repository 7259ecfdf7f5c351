"""Dual attention: the authors' two attentions side by side as one layer of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from reference.rope import rope_of


@adapter("dual-attention", mechanism="dual-attention")
def dual_attention(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    sensory, n = config["n_heads_sa"], config["n_heads_ra"]
    width = config["d_model"] // (sensory + n)
    told = str(config.get("symbols", ""))
    symbols, library, symbol_heads = "symbolic", None, 1
    for kind, count in (("self", "n_kv_heads_sa"), ("relational", "n_kv_heads_ra")):
        name = "wk" if kind == "self" else "wk_attn"
        case.states(**{count: (None, params[f"{kind}_attention.{name}.weight"].shape[0] // width)})
    for name in params:
        if name.startswith("symbol_retriever.") and params[name].ndim == 2:
            if "template_features" in name:
                found = re.search(r"(\d+) heads", told)
                symbol_heads = int(found[1]) if found else config.get("symbol_heads", 1)
            elif "q_proj" not in name:
                library = params[name]
                relative = (
                    "rel_pos" in name or told.startswith("relative") or "position-rel" in told
                )
                symbols = "relative" if relative else symbols
    if symbols == "symbolic" and "symbol_retriever.template_features" not in params:
        symbols = "positional"
    layer = attlas.make(
        "dual-attention", dim=config["d_model"], heads=sensory + n, relational_heads=n,
        relations=config.get("n_relations") or n, causal=config.get("causal", False),
        symmetric=config.get("symmetric_relations", False), symbols=symbols,
        activation=config.get("rel_activation", "identity"), symbol_heads=symbol_heads,
        library=(len(library) - 1) // 2 if symbols == "relative" else len(library),
        position=rope_of(config.get("rope"), width, interleaved=True),
    )  # fmt: skip

    def of(kind: str, name: str, heads: int) -> Tensor:
        """A projection, each of its heads repeated for the queries that share it."""
        weight = params[f"{kind}_attention.{name}.weight"]
        shared = weight.unflatten(0, (-1, width))
        return shared.repeat_interleave(heads // len(shared), dim=0).flatten(0, 1)

    weights = {
        "q_proj.weight": torch.cat((of("relational", "wq_attn", n), of("self", "wq", sensory))),
        "k_proj.weight": torch.cat((of("relational", "wk_attn", n), of("self", "wk", sensory))),
        "v_proj.weight": of("self", "wv", sensory), "symbol_proj.weight": of("relational", "wv", n),
        "o_proj.weight": params["self_attention.wo.weight"],
        "relational_o_proj.weight": params["relational_attention.wo.weight"],
        "relation_q.weight": params["relational_attention.wq_rel.weight"],
        "relation_out": params["relational_attention.wr"], "symbol_library": library,
    }  # fmt: skip
    if layer.relation_k is None:
        case.without_effect("param.relational_attention.wk_rel.weight")  # wq_rel once more
    else:
        weights["relation_k.weight"] = params["relational_attention.wk_rel.weight"]
    if symbols == "symbolic":
        weights["templates"] = params["symbol_retriever.template_features"]
        for part in ("weight", "bias"):
            weights[f"symbol_query.{part}"] = params[f"symbol_retriever.q_proj.{part}"]
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    *_, inputs = layer.prepare(x)
    if "symbols" in case.mids and symbols != "relative":
        yield case.compare("mid.symbols", layer.symbols_of(inputs))
    if "relations" in case.mids:
        yield case.compare("mid.relations", layer.relate(inputs).permute(0, 2, 3, 1))
    if "relational_weights" in case.mids:
        yield case.compare("mid.relational_weights", layer.weights(x)[:, :n])
