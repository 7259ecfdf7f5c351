"""Titans: the published program's module, without convolutions, and one head's output as it is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


def _weights(case: Case, residual: bool) -> dict[str, Tensor]:
    """Our names for the published ones; a module behind an activation is called .0 there."""
    params, heads = case.params, case.config["H"]
    names = {
        "read_norm": "retrieve_norm", "write_norm": "store_norm", "q_proj": "to_queries",
        "k_proj": "to_keys", "v_proj": "to_values", "step_proj": "to_adaptive_step",
        "momentum_proj": "to_momentum", "decay_proj": "to_decay_factor",
        "gate_proj": "retrieve_gate", "o_proj": "combine_heads",
    }  # fmt: skip
    found = {}
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            for name in (f"{theirs}.{part}", f"{theirs}.0.{part}"):
                if name in params:
                    found[f"{ours}.{part}"] = params[name]
    if heads == 1:
        found["o_proj.weight"] = torch.eye(case.config["D"])
    for name in "qk":
        if f"{name}_norm.gamma" in params:
            found[f"{name}_gain"] = params[f"{name}_norm.gamma"]
    for ours, name in enumerate(_order(case, residual)):
        at = case.config["memory_parameter_names"].index(name)
        found[f"memory.first.{ours}"] = params[f"memory_model_parameters.{at}"]
    return found


def _order(case: Case, residual: bool) -> list[str]:
    """The memory's tensors in our order: its layers, then γ."""
    prefix = "model.weights." if residual else "weights."
    layers = [f"{prefix}{i}" for i in range(case.config["depth"])]
    return [*layers, "norm.gamma"] if residual else layers


@adapter("titans-neural-memory", mechanism="titans-neural-memory")
def titans_neural_memory(case: Case) -> Iterator[Check]:
    config, x = case.config, case.inputs["x"]
    case.sizes(x, "B N D")
    layer = attlas.make(
        "titans-neural-memory", dim=config["D"], heads=config["H"], head_dim=config["dh"],
        chunk=config["chunk"], batch=config["batch"], depth=config["depth"],
        expansion=config["expansion_factor"], residual=config["resnorm"],
        momentum=config["momentum"], max_step=config["max_lr"], activation=config["act"],
        qk_norm="rms" if config["qk_norm"] else "none", kernel=1,
    )  # fmt: skip
    load_weights(layer, _weights(case, config["resnorm"]))
    cache = layer.init_cache()
    yield case.compare("out.y", layer(x, cache=cache))
    last = layer.memory.weights(cache.layers[0].states["memory"])
    for name, weight in zip(_order(case, config["resnorm"]), last, strict=True):
        if f"final_update.{name}" in case.outs:
            yield case.compare(f"out.final_update.{name}", weight.flatten(0, 1))
    yield from _surprises(case, layer, x)


def _surprises(case: Case, layer: nn.Module, x: Tensor) -> Iterator[Check]:
    """Steps and losses of all tokens, these at the weights that their batch began with."""
    _, k, v, inputs = layer.prepare(x)
    if "adaptive_lr" in case.mids:
        wanted = case.mids["adaptive_lr"].shape[-1]
        yield case.compare("mid.adaptive_lr", layer.gates(inputs)[..., 0][..., :wanted])
    if "surprise_loss" not in case.mids:
        return
    cache, losses = layer.init_cache(), []
    row = layer.memory.row().expand(len(x), -1, -1)
    size = layer.batch or x.shape[1]
    for start in range(0, x.shape[1], size):
        now = slice(start, start + size)
        apart = layer.memory(row, k[:, :, now]) - v[:, :, now]
        losses.append(apart.square().mean(-1))
        layer(x[:, now], cache=cache)
        row = cache.layers[0].states.get("base", row)
    wanted = case.mids["surprise_loss"].shape[-1]
    yield case.compare("mid.surprise_loss", torch.cat(losses, dim=-1)[..., :wanted])
