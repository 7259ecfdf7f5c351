"""Lightning attention and the layer around it: q, k and v side by side; the gate's two linears as one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("lightning-attention", mechanism="lightning-attention-2")
def lightning(case: Case) -> Iterator[Check]:
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    x = torch.cat([rearrange(each, "b h t d -> b t (h d)") for each in (q, k, v)], dim=-1)
    for out, scale in (("o", config["slope_factor"]), ("o_no_decay", 0.0)):
        layer = attlas.make(
            "lightning-attention-2", dim=x.shape[-1], heads=config["heads"],
            head_dim=config["head_dim"], slope_scale=scale, causal=True,
        )  # fmt: skip
        if out == "o":
            yield case.compare("in.slopes", -layer.log_decay)
        _, *_, inputs = layer.prepare(x)
        yield case.compare(f"out.{out}", layer.attend(q, k, v, attlas.masks.causal, inputs))


@adapter("transnormer-tnl-attention", mechanism="tnl-attention")
def tnl(case: Case) -> Iterator[Check]:
    config, params = case.config, dict(case.params)
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
    yield case.compare("mid.slopes", -layer.log_decay)
    yield case.compare("out.y", layer(case.inputs["x"]))
