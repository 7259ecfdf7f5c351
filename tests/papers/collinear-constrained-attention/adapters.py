"""How the published collinear attention's weights map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from reference.rope import rope_of


@adapter("coca", mechanism="collinear-constrained-attention")
def coca(case: Case) -> Iterator[Check]:
    config = case.config
    layer = attlas.make(
        "collinear-constrained-attention", dim=config["dim"], heads=config["heads"],
        kv_heads=config.get("kv_heads"), head_dim=config["head_dim"], form="released",
        causal=config.get("causal", True),
        position=rope_of(config.get("rope", True), config["head_dim"], interleaved=False),
    )  # fmt: skip
    load_weights(layer, {k.replace("t_proj", "k_proj"): w for k, w in case.params.items()})
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x))
