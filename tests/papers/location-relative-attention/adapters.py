"""Location-relative attention: published layers read a memory of another width than the query."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import attlas
from attlas.contract.cases import Case, Check, adapter, compare, load_weights

GMM_FOLDERS = [f"gmm-location-relative-v{version}" for version in "012"]


@adapter(*GMM_FOLDERS, "gmm-logistic-coqui", mechanism="gmm-attention")
def gmm(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    name = "mlp" if "mlp.0.weight" in params else "N_a"
    case.states(hidden=params[f"{name}.0.weight"].shape[0])
    layer = attlas.make(
        "gmm-attention", dim=config["query_dim"], components=config["components"],
        hidden=params[f"{name}.0.weight"].shape[0], version=config.get("version", "logistic"),
    )  # fmt: skip
    weights = {k.replace("N_a", "mlp"): v for k, v in params.items()}
    if name == "N_a":  # its widths come before its steps
        for part in ("weight", "bias"):
            share, sigma, delta = weights[f"mlp.2.{part}"].chunk(3)
            weights[f"mlp.2.{part}"] = torch.cat((share, delta, sigma))
    load_weights(layer, {**weights, "o_proj.weight": layer.o_proj.weight})
    yield from _compared(case, layer)
    if "means" in case.mids:
        yield case.compare("mid.means", layer.mixture(case.inputs["query"])[1])


RENAMED = {
    "query_layer": "steer.0", "key_layer": "steer.2", "static_filter_conv": "static.0",
    "static_filter_layer": "static.1", "dynamic_filter_layer": "dynamic", "v": "v",
}  # fmt: skip


@adapter("dynamic-convolution-attention", mechanism="dynamic-convolution-attention")
def dynamic_convolution(case: Case) -> Iterator[Check]:
    config, params = case.config, dict(case.params)
    case.sizes(case.inputs["memory"], "_ _ memory_dim")
    sizes = {
        kind: (config[f"{kind}_filters"], config[f"{kind}_kernel"]) for kind in ("static", "dynamic")
    }
    layer = attlas.make(
        "dynamic-convolution-attention", dim=config["query_dim"], hidden=config["attention_dim"],
        prior=(config["prior_alpha"], config["prior_beta"], config["prior_len"] - 1), **sizes,
    )  # fmt: skip
    prior = params.pop("prior").flatten()
    yield compare("param.prior", prior.new_tensor(layer.prior[::-1]), prior, case.atol, case.rtol)
    params["static_filter_conv.weight"] = params["static_filter_conv.weight"].squeeze(1)
    weights = {}
    for name, weight in params.items():
        first, _, rest = name.rpartition(".")
        weights[f"{RENAMED[first]}.{rest}"] = weight
    load_weights(layer, {**weights, "o_proj.weight": layer.o_proj.weight})
    shown = _shown(case)
    if shown is None:
        yield from _compared(case, layer)
        return
    # Theirs gives hidden places 1e-8 after the softmax and goes on from that; ours hides them before.
    query, memory = case.inputs["query"], case.inputs["memory"]
    filters = layer.steer(query)
    now, rows = torch.zeros_like(memory[..., 0]), []
    now[:, 0] = 1
    for t in range(query.shape[1]):
        now = layer.energies(now, filters[:, t]).softmax(-1).masked_fill(~shown, 1e-8)
        rows.append(now)
    yield case.compare("out.weights", torch.stack(rows, 1))
    yield case.compare("out.context", torch.stack(rows, 1) @ memory)


def _shown(case: Case) -> Tensor | None:
    """Places of the memory that are not hidden, told one by one or by their number; None for all."""
    if "memory_visible" in case.inputs:
        return case.inputs["memory_visible"] != 0
    if "memory_lengths" in case.inputs:
        places = torch.arange(case.inputs["memory"].shape[1])
        return places < case.inputs["memory_lengths"][:, None]
    return None


def _compared(case: Case, layer: attlas.Attention) -> Iterator[Check]:
    """Weights over the memory's places; their sum of it, as it has a width of its own."""
    memory: Tensor = case.inputs["memory"]
    case.sizes(memory, "_ _ memory_dim")
    blank = memory.new_zeros(*memory.shape[:2], layer.dim)
    found = layer.weights(case.inputs["query"], blank)[:, 0]
    shown = _shown(case)
    if shown is not None:
        found = found.masked_fill(~shown[:, None], 1e-8)  # theirs is not quite nothing
    yield case.compare("out.weights", found)
    yield case.compare("out.context", found @ memory)
