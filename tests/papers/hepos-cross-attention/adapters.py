"""Hepos: the authors' cross-attention, which appends zero tokens to the source for heads to see."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("hepos", mechanism="hepos-cross-attention")
def hepos(case: Case) -> Iterator[Check]:
    config, x, source = case.config, case.inputs["query"], case.inputs["encoder"]
    case.sizes(x, "B target_len _")
    case.sizes(source, "B source_len _")
    case.states(divide_type="stride")
    stride, tokens = config["stride"], source.shape[1]
    layer = attlas.make(
        "hepos-cross-attention", dim=x.shape[-1], heads=config["heads"], head_dim=config["head_dim"],
        stride=stride, bias=True,
    )  # fmt: skip
    load_weights(layer, {n.replace("out_proj", "o_proj"): w for n, w in case.params.items()})
    valid = torch.ones(source.shape[:2], dtype=torch.bool)
    if "key_padding_mask" in case.inputs:
        valid = ~case.inputs["key_padding_mask"].bool()
    if tokens >= stride:
        more = (tokens // stride + 1) * stride - tokens
        source, valid = pad(source, (0, 0, 0, more)), pad(valid, (0, more), value=True)
    # Pair by pair, since positions in the source are counted with its padding.
    pairs = valid[:, None, None].expand(-1, 1, x.shape[1], -1)
    yield case.compare("out.o", layer(x, source, mask=pairs))
