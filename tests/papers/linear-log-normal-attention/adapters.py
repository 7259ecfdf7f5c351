"""Linear log-normal attention: queries, keys and values, whole and causal, in every mode of mixing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import attlas
from attlas.contract.cases import Case, Check, adapter
from attlas.inputs import Inputs
from attlas.layers.linear.log_normal import matched


@adapter("lln-attention", mechanism="linear-log-normal-attention")
def log_normal(case: Case) -> Iterator[Check]:
    q, k, v = (case.inputs[name] for name in "qkv")
    heads, tokens, width = q.shape[1:]
    at = torch.arange(tokens)
    inputs = Inputs(torch.zeros(len(q), tokens, heads * width), None, at, at)
    case.sizes(q, "B H N D")
    case.without_effect("config.sq", "config.sk")  # by which the inputs given were scaled
    mode = case.config["mode"].removeprefix("learnable_")
    for form in ("full", "causal"):
        layer, plain = (
            attlas.make(
                "linear-log-normal-attention", dim=heads * width, heads=heads, blocks=blocks,
                eps=0.0 if form == "causal" else case.config["eps"], causal=form == "causal",
                mix=mode if blocks else "average",
            ).to(q.dtype).eval()
            for blocks in (True, False)
        )  # fmt: skip
        for each in (layer, plain):
            each.calibrate(q, k)
        for name in case.params:
            layer.get_parameter(f"{name}_share").copy_(case.params[name][0])
        lln = plain.attend(q, k, v, inputs)
        diagonal = layer.diagonal(q, k, v, inputs)
        both = layer.attend(q, k, v, inputs)
        if form == "causal":
            share = _seen(plain, q, k, case.config["eps"])
            lln = lln * share
            both = layer.mixed(lln, diagonal)
        found = {
            f"out.lln_{form}": lln,
            f"out.lln_plus_diag_{form}": both,
            f"mid.diag_{form}": diagonal,
        }
        for name, ours in found.items():
            group, _, rest_of_name = name.partition(".")
            if rest_of_name in (case.outs if group == "out" else case.mids):
                yield case.compare(name, ours)


def _seen(layer: nn.Module, q: Tensor, k: Tensor, eps: float) -> Tensor:
    """What the program's ε leaves of a causal output: its sums are relative to the sequence's largest
    key, which ours does not know when it is still to come."""
    alpha, beta = matched(layer.q_std, layer.k_std)
    asked = (alpha * q - (alpha * q).amax(-1, keepdim=True)).exp()
    total = (beta * k - (beta * k).amax((-2, -1), keepdim=True)).exp().cumsum(2)
    sums = (asked * total).sum(-1, keepdim=True)
    return sums / (sums + eps)
