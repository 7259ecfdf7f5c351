"""Hedgehog: published queries, keys and values, through every activation that a case has."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.inputs import Inputs

#: Name in the program -> options.
KINDS = {
    "softmax_dim": {"activation": "softmax"},
    "exp_dim": {"activation": "exp"},
    "softmax_dim_half": {"activation": "softmax", "negated": False},
    "exp_dim_half": {"activation": "exp", "negated": False},
}


@adapter("hedgehog", mechanism="hedgehog")
def hedgehog(case: Case) -> Iterator[Check]:
    q, k, v = (case.inputs[name] for name in "qkv")
    heads, tokens, width = q.shape[1:]
    case.sizes(q, "B H N D")
    at = torch.arange(tokens)
    for kind, options in KINDS.items():
        for form in ("causal", "full"):
            wanted = f"{form}_{kind}"
            if wanted not in case.outs:
                continue
            layer = attlas.make(
                "hedgehog", dim=heads * width, heads=heads, head_dim=width,
                feature_dim=case.config["F"], feature_bias=case.config["bias"],
                causal=form == "causal", **options,
            )  # fmt: skip
            own = {n: w for n, w in layer.state_dict().items() if n.endswith("proj.weight")}
            for name in "qk":
                own[f"{name}_map"] = case.params[f"feature_map_{name}.layer"]
                if case.config["bias"]:  # the program's is one a head
                    bias = case.params[f"feature_map_{name}.bias"][0]
                    own[f"{name}_map_bias"] = bias.expand(heads, 1, case.config["F"])
            load_weights(layer, own)
            x = torch.zeros(len(q), tokens, heads * width)
            inputs = Inputs(x, None, at, at, pairs=layer.pattern)
            yield case.compare(f"out.{wanted}", layer.attend(q, k, v, inputs))
            if f"attn_{wanted}" in case.mids:
                weights = layer.weigh(q, k, inputs)
                yield case.compare(f"mid.attn_{wanted}", weights)
            if f"phi_q_{kind}" in case.mids:
                yield case.compare(f"mid.phi_q_{kind}", layer.features(q, k, inputs)[0])
