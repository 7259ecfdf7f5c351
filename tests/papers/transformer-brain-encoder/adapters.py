"""The adapter of the transformer brain encoder to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.systems.transformer_brain_encoder import BrainEncoder

#: Our names of a layer's parts, and theirs.
NAMES = {"up": "linear1", "down": "linear2", "norm1": "norm1", "norm2": "norm2", "norm3": "norm3"}
ROUTING = "multihead_attn"


@adapter("transformer-brain-encoder", mechanism="transformer-brain-encoder")
def transformer_brain_encoder(case: Case) -> Iterator[Check]:
    """The areas' tokens, the map, and what each hemisphere reads from them."""
    config, given, weights = case.config, case.inputs, case.params
    features, places = given["features"], given["positional"]
    case.sizes(features, "B d_model _ _")
    case.states(map=list(features.shape[2:]), activation="relu")
    net = BrainEncoder(
        dim=config["d_model"], heads=config["heads"], ff=config["dim_feedforward"],
        layers=config["decoder_layers"], areas=config["queries"], dropout=0.0,
        units=(config["lh_vertices"], config["rh_vertices"]),
    ).eval()  # fmt: skip
    ours = {"queries": weights["query_embed"]}
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = weights[f"decoder.norm.{kind}"]
        for i in range(config["decoder_layers"]):
            theirs, own = f"decoder.layers.{i}.", f"decoder.{i}."
            for name, said in NAMES.items():
                ours[f"{own}{name}.{kind}"] = weights[f"{theirs}{said}.{kind}"]
            joined = weights[f"{theirs}{ROUTING}.in_proj_{kind}"].chunk(3)
            for letter, part in zip("qkv", joined, strict=True):
                ours[f"{own}routing.{letter}_proj.{kind}"] = part
            ours[f"{own}routing.o_proj.{kind}"] = weights[f"{theirs}{ROUTING}.out_proj.{kind}"]
            # Self-attention of the areas: it has weights, which the published program does not use.
            unused = (f"{theirs}self_attn.in_proj_{kind}", f"{theirs}self_attn.out_proj.{kind}")
            case.without_effect(*(f"param.{name}" for name in unused))
        for i, name in enumerate(("lh_embed", "rh_embed")):
            ours[f"readout.{i}.{kind}"] = weights[f"{name}.{kind}"]
    load_weights(net, ours)
    net.to(features.dtype)
    with torch.no_grad():
        tokens, found = net.tokens(features, places)
        left, right = net(features, places)
    if "attention" in case.mids:
        yield case.compare("mid.attention", found)
    yield case.compare("out.tokens", tokens)
    yield case.compare("out.lh", left)
    yield case.compare("out.rh", right)
