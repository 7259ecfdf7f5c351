"""The adapters of window attention: its kernel's reference, and a block of Swin around it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear

from attlas.contract.cases import Case, Check, adapter
from attlas.ops.windows import joined, partition, relative_bias, shift_mask, window_attend


@adapter("flash-window", mechanism="flash-window-attention")
def flash_window(case: Case) -> Iterator[Check]:
    """Outputs, with or without bias and mask; rows are windows, those of an image behind one another."""
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "_ heads N head_dim")
    case.states(windows=q.shape[0] // case.config["batch"])
    mask = case.inputs.get("mask")
    if mask is not None:
        case.states(windows=len(mask))
    yield case.compare("out.o", window_attend(q, k, v, bias=case.inputs.get("bias"), mask=mask))


@adapter("swin-window", mechanism="flash-window-attention")
def swin_window(case: Case) -> Iterator[Check]:
    """A block's attention: shift, windows, projections, bias and mask. Published masks add −100 where
    ours hide."""
    config, x = case.config, case.inputs["x"]
    case.sizes(x, "B H W dim")
    size, shift = (tuple(config[name]) for name in ("window_size", "shift_size"))
    grid, weights, heads = tuple(x.shape[1:3]), case.params, config["heads"]
    qkv = linear(partition(x, size, shift), weights["qkv.weight"], weights.get("qkv.bias"))
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    seen = shift_mask(grid, size, shift) if any(shift) else None
    if seen is not None:
        published = torch.zeros(seen.shape).masked_fill(~seen, -100.0)
        if "attn_mask" in case.mids:
            yield case.compare("mid.attn_mask", published)
    out = window_attend(
        q, k, v, bias=relative_bias(weights["relative_position_bias_table"], size), mask=seen
    )
    projected = linear(out.transpose(1, 2).flatten(2), weights["proj.weight"], weights["proj.bias"])
    yield case.compare("out.o", joined(projected, size, grid, shift))
