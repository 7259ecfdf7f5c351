"""How the authors' two programs of mixture-of-head attention map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import layer_norm

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from reference.rope import rope_of


@adapter("moh", mechanism="mixture-of-head")
def vision(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    layer = attlas.make(
        "mixture-of-head", dim=config["dim"], heads=config["num_heads"],
        head_dim=config["head_dim"], shared_heads=config["shared_heads"],
        routed_active=config["routed_active"], causal=config.get("causal", False), bias=True,
        load_balance=1.0,
    )  # fmt: skip
    case.states(qkv_bias="qkv.bias" in params)
    names = {
        "wg.weight": "router.weight", "wg_1.weight": "shared_router.weight",
        "wg_0.weight": "balance.weight", "proj.weight": "o_proj.weight", "proj.bias": "o_proj.bias",
    }  # fmt: skip
    weights = {ours: params[theirs] for theirs, ours in names.items() if theirs in params}
    for what in ("weight", "bias"):
        if f"qkv.{what}" in params:
            parts = params[f"qkv.{what}"].chunk(3)
            weights |= {f"{n}_proj.{what}": part for n, part in zip("qkv", parts, strict=True)}
    load_weights(layer, weights)
    q, k, *rest = layer.prepare(case.inputs["x"])
    if config.get("qk_norm"):
        q, k = (
            layer_norm(t, t.shape[-1:], params[f"{n}_norm.weight"], params[f"{n}_norm.bias"])
            for n, t in (("q", q), ("k", k))
        )
    heads, inputs = layer.attend(q, k, *rest), rest[-1]
    yield case.compare("out.y", layer.output(heads, inputs))
    yield from _gated(case, layer, heads, inputs)
    if "load_balance_loss" in case.outs:
        layer.train().output(heads, inputs)
        theirs = case.outs["load_balance_loss"]
        yield case.compare("out.load_balance_loss", layer.auxiliary_loss.reshape(theirs.shape))


@adapter("moh-llama", mechanism="mixture-of-head")
def llama(case: Case) -> Iterator[Check]:
    config = case.config
    layer = attlas.make(
        "mixture-of-head", dim=config["dim"], heads=config["heads"], kv_heads=config["kv_heads"],
        head_dim=config["head_dim"], shared_heads=config["shared_heads"],
        routed_active=config["routed_active"], router="query-norm",
        causal=config.get("causal", True),
        position=rope_of(config.get("rope"), config["head_dim"], interleaved=False),
    )  # fmt: skip
    load_weights(layer, case.params)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    *prepared, inputs = layer.prepare(x)
    yield from _gated(case, layer, layer.attend(*prepared, inputs), inputs)


def _gated(
    case: Case, layer: torch.nn.Module, heads: torch.Tensor, inputs: attlas.inputs.Inputs
) -> Iterator[Check]:
    if "gated_heads" in case.mids:
        gated = heads.movedim(1, 2) * layer.head_gates(inputs)[..., None]
        yield case.compare("mid.gated_heads", gated.flatten(2))
