"""Lightning attention is a function of q, k and v, which a layer takes side by side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange

import attlas
from attlas.contract.cases import Case, Check, adapter


@adapter("lightning-attention", mechanism="lightning-attention-2")
def lightning(case: Case) -> Iterator[Check]:
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "batch heads length head_dim")
    case.states(value_dim=v.shape[-1])
    x = torch.cat([rearrange(each, "b h t d -> b t (h d)") for each in (q, k, v)], dim=-1)
    for out, scale in (("o", config["slope_factor"]), ("o_no_decay", 0.0)):
        layer = attlas.make(
            "lightning-attention-2", dim=x.shape[-1], heads=config["heads"],
            head_dim=config["head_dim"], value_dim=v.shape[-1], slope_scale=scale, causal=True,
        ).to(q.dtype)  # fmt: skip
        if out == "o":
            yield case.compare("in.slopes", -layer.log_decay)
        _, *_, inputs = layer.prepare(x)
        yield case.compare(f"out.{out}", layer.attend(q, k, v, inputs))
