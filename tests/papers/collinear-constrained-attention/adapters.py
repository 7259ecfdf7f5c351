"""How the published collinear attention's weights map to ours."""

from __future__ import annotations

import re
from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.positions import RoPE


@adapter("coca", mechanism="collinear-constrained-attention")
def coca(case: Case) -> Iterator[Check]:
    config = case.config
    base = re.search(r"base (\d+)", str(config.get("rope", "")))
    layer = attlas.make(
        "collinear-constrained-attention", dim=config["dim"], heads=config["heads"],
        kv_heads=config.get("kv_heads"), head_dim=config["head_dim"], form="released",
        causal=config.get("causal", True),
        position=RoPE(config["head_dim"], float(base[1]) if base else 1e4),
    )  # fmt: skip
    load_weights(layer, {k.replace("t_proj", "k_proj"): w for k, w in case.params.items()})
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x))
