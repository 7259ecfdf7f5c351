"""MALA, RALA and NaLaFormer: queries, keys, values and a gate by one map; pictures [batch, dim, h, w]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange

import attlas
from attlas.contract.cases import Case, Check, load_weights

NAMES = {"lepe": "conv", "proj": "o_proj", "out_proj": "o_proj", "ln": "norm"}


def gated_on_grid(case: Case) -> Iterator[Check]:
    """Run the layer that the case is named after."""
    config, x = case.config, case.inputs["x"]
    height, width = x.shape[2:]
    case.sizes(x, "B dim h w")
    layer = attlas.make(
        case.name, dim=config["dim"], heads=config["heads"], grid=(height, width),
        kernel_size=case.params["lepe.weight"].shape[-1],
    )  # fmt: skip
    weights = {}
    for name, weight in case.params.items():
        module, _, part = name.partition(".")
        if module in NAMES:
            ours, each = (NAMES[module],), (weight,)
        else:
            ours, each = ("q_proj", "k_proj", "v_proj", "gate_proj"), weight.chunk(4)
        for to, one in zip(ours, each, strict=True):
            # What is a 1 × 1 convolution there is a matrix here.
            weights[f"{to}.{part}"] = one[..., 0, 0] if to != "conv" and one.ndim == 4 else one
    load_weights(layer, weights)
    # A pair (1, 0) of every two channels, turned, is the cosine and sine of its angle.
    pairs = torch.tensor([1.0, 0.0]).repeat(1, 1, height * width, layer.head_dim // 2)
    turned = layer.rotated(pairs)[0, 0]
    for at, name in enumerate(("cos", "sin")):
        if name in case.inputs:
            yield case.compare(f"in.{name}", turned[:, at::2].repeat_interleave(2, -1))
    y = layer(rearrange(x, "b c h w -> b (h w) c"))
    yield case.compare("out.y", rearrange(y, "b (h w) c -> b c h w", h=height))
