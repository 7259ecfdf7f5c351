"""How the authors' key-driven grouped attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights

NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"}


@adapter("key-driven-gqa", mechanism="key-driven-gqa")
def key_driven(case: Case) -> Iterator[Check]:
    config = case.config
    layer = attlas.make(
        "key-driven-gqa", dim=config["dim"], heads=config["num_heads"], over="batch", bias=True,
        kv_heads=config["num_kv_heads"], causal=config.get("causal", False),
    )  # fmt: skip
    weights = {}
    case.states(qkv_bias="q.bias" in case.params)
    for name, weight in case.params.items():
        first, _, rest = name.partition(".")
        weights[f"{NAMES[first]}.{rest}"] = weight
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "query_heads_per_group" in case.mids:
        inputs = layer.prepare(x)[-1]
        k = layer.project(inputs)[1]
        yield case.compare("mid.query_heads_per_group", layer.counts(layer.norms(k, inputs))[0])
