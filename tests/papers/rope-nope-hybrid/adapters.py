"""How the layers of Cohere2 in Transformers, the product form of the hybrid, map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("rope-nope-hybrid", mechanism="rope-nope-hybrid")
def rope_nope_hybrid(case: Case) -> Iterator[Check]:
    config, x = case.config, case.inputs["x"]
    for kind, layer_idx in {"local_rope": 0, "global_nope": 3}.items():
        if kind not in case.outs:
            continue
        layer = attlas.make(
            "rope-nope-hybrid", dim=config["dim"], heads=config["heads"],
            kv_heads=config.get("kv_heads"), head_dim=config.get("head_dim"), causal=True,
            window=config["sliding_window"], base=config.get("rope_theta", 1e4), interleaved=True,
            qk_norm=bool(config.get("qk_norm")), layer_idx=layer_idx,
        )  # fmt: skip
        names = [name for name in case.params if name.startswith(f"{kind}.")]
        own = {name.removeprefix(f"{kind}."): case.params[name] for name in names}
        load_weights(layer, {n.replace("_norm.weight", "_norm"): w for n, w in own.items()})
        yield case.compare(f"out.{kind}", layer(x))
        if f"weights_{kind}" in case.mids:
            yield case.compare(f"mid.weights_{kind}", layer.weights(x))
