"""TransNormer's layer around lightning attention: the gate's two linears as one."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("transnormer-tnl-attention", mechanism="tnl-attention")
def tnl(case: Case) -> Iterator[Check]:
    config, params = case.config, dict(case.params)
    case.sizes(case.inputs["x"], "batch length dim")
    layer = attlas.make(
        "tnl-attention", dim=config["dim"], heads=config["heads"], bias=config["bias"], causal=True,
        layers=config["num_layers"], layer_idx=config["layer_idx"],
    )  # fmt: skip
    down, up = (params.pop(f"output_gate.{n}.weight") for n in (0, 1))
    first, second = (params.pop(f"output_gate.{n}.bias", None) for n in (0, 1))
    weights = {**params, "gate_proj.weight": up @ down}
    if config["bias"]:
        shift = 0.0 if first is None else up @ first
        weights["gate_proj.bias"] = shift + (0.0 if second is None else second)
    load_weights(layer, weights)
    if "slopes" in case.mids:
        yield case.compare("mid.slopes", -layer.log_decay)
    yield case.compare("out.y", layer(case.inputs["x"]))
