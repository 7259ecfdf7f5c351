"""How QAQ's published functions map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from attlas.contract.cases import Case, Check, adapter
from attlas.parts.quantize.qaq import centred, group_bits, key_error, outlying, value_error
from attlas.storage.varied import Varied


@adapter("qaq-fixed-bits", "qaq-key", "qaq-value", mechanism="qaq-quality-adaptive-quantization")
def qaq(case: Case) -> Iterator[Check]:
    """A whole cache [layers, batch, heads, tokens, dim], its groups and their bits."""
    config, cache = case.config, case.inputs["cache"]
    layers, _, heads, tokens, _ = cache.shape
    case.sizes(cache, "L B heads T head_dim")
    case.states(key_or_value=("key", "value"))
    shapes = {
        "token": "l b h t d -> t b 1 (l h d)",
        "layer": "l b h t d -> t b l (h d)",
        "head": "l b h t d -> t b (l h) d",
    }
    level = config["level"]
    x = rearrange(cache, shapes[level])
    normal, symmetric = config["method"] == "normal", config["symmetric"]
    apart = outlying(x, config["outliers_ratio"])
    bits = torch.full(x.shape[:3], config.get("n_bits_uniform", 0))
    if config["use_attentions"]:
        target, count = config["target_quantization_error"], torch.tensor([tokens])
        if config["key_or_value"] == "key":
            error = key_error(count, target, config["q_norm"])
        else:
            attention = case.inputs["attentions"][:, :, :, -config["last_n_attentions"] :]
            most = rearrange(attention.amax(dim=3), "l b h t -> l b h t 1")
            error = value_error(count, target) / rearrange(most, shapes[level]).amax(dim=-1)
        bits = group_bits(x, apart, error, config["n_bits_min"], config["n_bits_max"], symmetric)
        if newest := config["last_n_attentions"] - 1:
            bits[-newest:] = config["n_bits_max"]
    if "n_bits" in case.mids:
        yield case.compare("mid.n_bits", by_level(bits, level, layers, heads))
    named = {"token": "t b 1 (l h d) -> b t l h d", "layer": "t b l (h d) -> b t l h d",
             "head": "t b (l h) d -> b t l h d"}  # fmt: skip
    mask = rearrange(apart, named[level], l=layers, h=heads)
    if "outlier_mask" in case.mids:
        yield case.compare("mid.outlier_mask", mask)
    mean, scale = centred(x, apart, bits, config["method"], "zero" if symmetric else "mean")
    held = Varied.packed(x, bits, mean, scale, apart, heads=layers * heads, normal=normal)
    ours = rearrange(held.read(), "b (l h) t d -> l b h t d", l=layers)
    yield case.compare("out.dequantized", ours)
    ratio = config["outliers_ratio"]
    width = torch.finfo(cache.dtype).bits
    average = bits.float().mean() * (1 - ratio) + width * ratio
    yield case.compare("out.average_bits", average[None])


def by_level(bits: Tensor, level: str, layers: int, heads: int) -> Tensor:
    """Bits as they are published: [batch, tokens], with layers, with heads."""
    if level == "token":
        return rearrange(bits, "t b 1 -> b t")
    if level == "layer":
        return rearrange(bits, "t b l -> b t l")
    return rearrange(bits, "t b (l h) -> b t l h", l=layers, h=heads)
