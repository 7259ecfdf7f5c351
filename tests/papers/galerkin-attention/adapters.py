"""Galerkin attention: the authors' linears by number, and a norm for every head."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights

NAMES = {"galerkin": "galerkin-attention", "fourier": "fourier-attention",
         "linear": "galerkin-linear-attention"}  # fmt: skip


@adapter("galerkin", mechanism="galerkin-attention")
@adapter("fourier", mechanism="fourier-attention")
@adapter("galerkin-linear", mechanism="galerkin-linear-attention")
def galerkin(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    places = case.inputs.get("pos")
    width, heads = config["d_model"], config["n_head"]
    layer = attlas.make(
        NAMES[config["attention_type"]], dim=width, heads=heads, eps=config.get("norm_eps", 1e-5),
        coordinates=0 if places is None else places.shape[-1], norm=config.get("norm") or "none",
    )  # fmt: skip
    case.states(causal=False)
    if places is None:
        # Of coordinates that are not given; without them heads are only joined.
        case.without_effect("config.pos_dim", "param.fc.weight", "param.fc.bias")
    else:
        case.sizes(places, "_ _ pos_dim")
    if layer.norm == "none":
        case.without_effect("config.norm_eps")
    weights = {}
    for at, name in enumerate("qkv"):
        for part in ("weight", "bias"):
            weights[f"{name}_proj.{part}"] = params[f"linears.{at}.{part}"]
        if name not in layer.with_norm:
            continue
        for ours, theirs in {"gain": "weight", "shift": "bias"}.items():
            each = [params.get(f"norm_{name.upper()}.{h}.{theirs}") for h in range(heads)]
            ones = torch.full((heads, width // heads), float(ours == "gain"))
            weights[f"{name}_{ours}"] = (ones if each[0] is None else torch.stack(each))[:, None]
    weights["o_proj.weight"] = torch.eye(width) if places is None else params["fc.weight"]
    weights["o_proj.bias"] = torch.zeros(width) if places is None else params["fc.bias"]
    load_weights(
        layer, {name: weight.to(case.inputs["x"].dtype) for name, weight in weights.items()}
    )
    x, extras = case.inputs["x"], {} if places is None else {"coordinates": places}
    yield case.compare("out.y", layer(x, **extras))
    if "matrix" in case.mids:
        if config["attention_type"] == "fourier":
            yield case.compare("mid.matrix", layer.weights(x, **extras))
        else:
            _, k, v, inputs = layer.prepare(x, extras=extras)
            yield case.compare("mid.matrix", layer.matrix(k, v, inputs))
