"""Transformer-VQ: kernels are [in, out] there, and the layer normalises its input itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("transformer-vq", mechanism="transformer-vq")
def transformer_vq(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    heads, width, values = config["H"], config["dk"], config["dv"]
    layer = attlas.make(
        "transformer-vq", dim=config["D"], heads=heads, head_dim=width, value_dim=values,
        codes=config["S"], block=config["L"], memory=config["M"], older=config["agg"],
        wavelength=config["pe_lam"],
    ).eval()  # fmt: skip
    parts = [heads * width, heads * values, heads * values]
    k, v, g = params["kvg_proj.kernel"].split(parts, dim=1)
    kernels = {"k": k, "v": v, "g": g, "q": params["q_proj.kernel"], "r": params["r_proj.kernel"]}
    weights = {f"{name}_proj.weight": kernel.T for name, kernel in kernels.items()}
    weights |= {
        "o_proj.weight": params["res_proj.kernel"].T,
        "content_bias": params["u"].view(heads, 1, width),
        "distance_bias": params["v"].view(heads, 1, width),
        "code_sums": params["quantizer.c_sum"],
        "code_counts": params["quantizer.c_count"],
    }
    load_weights(layer, weights)
    x = case.inputs["x"]
    case.states(B=len(x), blocks=x.shape[1] // config["L"])
    x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    x = x * params["input_ln.g"] + params["input_ln.b"]
    yield case.compare("out.y", layer(x))
    cache = layer.init_cache()
    # Blocks of the program, one pass each; its states are those after the last.
    parts = [layer(block, cache=cache) for block in x.split(config["L"], dim=1)]
    yield case.compare("out.y", torch.cat(parts, dim=1))
    state = cache.layers[0].states
    counts = state["counts"]
    if "cache_counts" in case.outs:
        yield case.compare("out.cache_counts", counts)
        means = state["sums"] / counts.clamp(min=1.0)[..., None]
        yield case.compare("out.cache_means", means)
        last = state["codes"]
        yield case.compare("out.last_codes", last.masked_fill(last < 0, config["S"]))
