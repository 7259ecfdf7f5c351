"""One query through a selection over packed pages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attlas import ops
from attlas.attach.call import Call, ForwardPass
from attlas.cache.selection import Selection
from attlas.storage.layer import Chosen, LayerState
from attlas.storage.packed import PackedBody


def read(part: Selection, q: Tensor, k: Tensor, v: Tensor) -> tuple[Chosen, Tensor, Tensor]:
    """(choice, weights, heads) of one query when all keys are packed and summarised."""
    scaling = q.shape[-1] ** -0.5
    state, body = LayerState(0, (0,), scaling=scaling), PackedBody(k, v)
    part.summarize(state, body)
    call = Call(
        0, nn.Identity(), q, k[:, :, -1:], v[:, :, -1:], scaling, None, ForwardPass(length=1)
    )
    chosen = part.choose(state, body, call)
    assert chosen is not None
    tokens = k.shape[2]
    places = torch.eye(tokens, dtype=v.dtype).expand(*k.shape[:2], -1, -1)
    weights, heads = (
        ops.decode(q, [PackedBody(k, x).segment(chosen.index, chosen.page)], scale=scaling)[0]
        for x in (places, v)
    )
    return chosen, weights, heads
