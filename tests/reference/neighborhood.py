"""Neighbourhood attention in NATTEN's cases: tokens of a grid row by row, a mask, the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attlas import masks
from attlas.contract.cases import Case, Check


def neighborhood_case(
    case: Case, run: Callable[..., dict[str, Tensor]], **fixed: Any
) -> Iterator[Check]:
    """Check the pattern, and each output that `run(q, k, v, shape=…, window=…, …)` gives by its name.

    Args:
        case: with q, k and v.
        run: the mechanism, by its routes.
        fixed: config keys that the mechanism knows one value of alone, which `run` is not given.
    """
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "B heads _ head_dim")
    case.sizes(k, "B kv_heads _ head_dim")
    grid = {
        "shape": tuple(config["spatial_shape"]),
        "window": tuple(config["kernel_size"]),
        "stride": tuple(config["stride"]),
        "dilation": tuple(config["dilation"]),
        "causal": tuple(config["is_causal"]),
    }
    tokens = math.prod(grid["shape"])
    if "mask" in case.mids:
        ours = masks.dense(masks.neighborhood(**grid), tokens, tokens)[0, 0]
        wrong = (ours != case.mids["mask"].bool()).sum()
        yield Check("mid.mask", float(wrong), 0.0)
    for name, each in fixed.items():
        case.states(**{name: [each] * len(grid["shape"])})
        del grid["causal" if name == "is_causal" else name]
    with torch.no_grad():
        for name, out in run(q, k, v, **grid).items():
            yield case.compare("out.o", out)._replace(name=f"out.o, {name}")
