"""MALA, RALA and NaLaFormer: queries, keys, values and a gate by one map; pictures [batch, dim, h, w]."""

from __future__ import annotations

from collections.abc import Iterator

from einops import rearrange

import attlas
from attlas.contract.cases import Case, Check, load_weights

NAMES = {"lepe": "conv", "proj": "o_proj", "out_proj": "o_proj", "ln": "norm"}


def gated_on_grid(case: Case) -> Iterator[Check]:
    """Run the layer that the case is named after."""
    config, x = case.config, case.inputs["x"]
    height, width = x.shape[2:]
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
    y = layer(rearrange(x, "b c h w -> b (h w) c"))
    yield case.compare("out.y", rearrange(y, "b (h w) c -> b c h w", h=height))
