"""A layer whose queries, keys and values are given: its input is the three side by side."""

from __future__ import annotations

import torch
from torch import Tensor

import attlas
from attlas.contract.cases import load_weights


def attended(name: str, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """What the heads of a layer of that name give for q [batch, heads, tokens, dim], k and v, as q is."""
    sizes = [x.shape[1] * x.shape[3] for x in (q, k, v)]
    layer = attlas.make(
        name, dim=sum(sizes), heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[3], **options
    ).to(q.dtype)
    each = torch.eye(sum(sizes), dtype=q.dtype).split(sizes)
    weights = {f"{side}_proj.weight": rows for side, rows in zip("qkv", each, strict=True)}
    load_weights(layer, weights | {"o_proj.weight": torch.eye(sum(sizes), sizes[0], dtype=q.dtype)})
    x = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], dim=-1)
    y: Tensor = layer(x)
    return y[..., : sizes[0]].unflatten(2, (q.shape[1], -1)).transpose(1, 2)
