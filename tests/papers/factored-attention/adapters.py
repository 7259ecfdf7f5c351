"""How the authors' tutorial of factored attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("factored-position-only", mechanism="factored-attention")
def factored(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    layer = attlas.make(
        "factored-attention", dim=config["d_model"], heads=config["n_heads"],
        length=config["n_patches"], bias=True,
        lattice="square" if config["translation_invariant"] else "free",
    )  # fmt: skip
    weights = {"alpha": params["alpha"]}
    case.states(dtype=str(case.inputs["x"].dtype).removeprefix("torch."))
    for ours, theirs in (("v_proj", "v"), ("o_proj", "W")):
        weights[f"{ours}.weight"] = params[f"{theirs}.kernel"].T.contiguous()
        if f"{theirs}.bias" in params:
            weights[f"{ours}.bias"] = params[f"{theirs}.bias"]
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x)[0])
