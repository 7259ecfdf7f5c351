"""Multi-token attention: the authors' layer, its gates and head mixings where a case has them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.positions import RoPE


@adapter("multi-token", mechanism="multi-token-attention")
def multi_token(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    heads = config["n_heads"]
    kernels = {"kernel": "mta_kernel", "after_kernel": "mta_kernel_after_sm"}
    sizes = {ours: tuple(params[name].shape[2:]) for ours, name in kernels.items() if name in params}
    told = {
        "mta_kernel": "_ _ query_kernel_size key_kernel_size",
        "mta_kernel_after_sm": "_ _ after_sm_query_kernel_size after_sm_key_kernel_size",
        "head_kernel": "_ head_kernel_size _",
    }  # fmt: skip
    for name, axes in told.items():
        if name in params:
            case.sizes(params[name], axes)
        else:
            case.states(**{axis: None for axis in axes.split() if axis != "_"})
    case.states(
        dropout=(0, 0.0), group_norm="subln.weight" in params, add_gating="gate.weight" in params,
        pre_sm_linear_head="wpsm.weight" in params, post_sm_linear_head="wposm.weight" in params,
    )  # fmt: skip
    mix = params.get("head_kernel")
    if "wposm.weight" in params:
        mix = params["wposm.weight"].T[None]
    gate = params.get("gate.weight")
    case.states(gate_1d=(True, False) if gate is None else gate.shape[0] == 1)
    layer = attlas.make(
        "mta", dim=config["dim"], heads=heads, kv_heads=config.get("n_kv_heads") or heads,
        head_dim=config["head_dim"], causal=config.get("causal", True),
        position=RoPE(config["head_dim"], config["rope_theta"], interleaved=True),
        **{"kernel": (1, 1), **sizes}, key_padding=config.get("pad_key", "both"),
        mix_scores="wpsm.weight" in params, head_kernel=1 if mix is None else mix.shape[1],
        norm="subln.weight" in params, rescale=config.get("layer_norm_rescale", False),
        gate=None if gate is None else "scalar" if gate.shape[0] == 1 else "channels",
        depth=config["layer_id"],
    )  # fmt: skip
    renamed = {
        "wq.weight": "q_proj.weight", "wk.weight": "k_proj.weight", "wv.weight": "v_proj.weight",
        "wo.weight": "o_proj.weight", "subln.weight": "norm.weight", "wpsm.weight": "score_mix",
        "mta_kernel": "kernel", "mta_kernel_after_sm": "after_kernel",
        "gate.weight": "gate.weight", "gate.bias": "gate.bias",
    }  # fmt: skip
    weights = {ours: params[name] for name, ours in renamed.items() if name in params}
    dtype = params["wq.weight"].dtype
    weights.setdefault("kernel", torch.ones(heads, 1, 1, 1, dtype=dtype))
    weights["head_mix"] = torch.ones(heads, 1, 1, dtype=dtype) if mix is None else mix
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x))
