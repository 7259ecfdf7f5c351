"""Attention weights in blocks of queries, exactly as the model's own eager attention has them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach.call import Call

#: Scores held at once: 32 MiB in float32.
BLOCK = 2**23


def weight_blocks(
    call: Call, size: int = BLOCK
) -> Iterator[
    tuple[
        Float[Tensor, "batch heads query keys"],
        Int[Tensor, " query"],
        Int[Tensor, " keys"] | Int[Tensor, "batch heads keys"],
    ]
]:
    """Yield (weights, columns of the queries, columns of the keys) for successive queries.

    weights = softmax(mod(q kᵀ · scaling), masked), in float32; with sink logits the softmax runs
    over them too. Memory is `size` scores whatever the length.
    """
    batch, heads, length, _ = call.q.shape
    slots = call.k.shape[2]
    rows = max(1, size // (batch * heads * slots))
    keys = call.k.float().repeat_interleave(call.groups, dim=1)
    columns = call.head_columns
    queries, real = call.queries, call.real
    triangle = call.mask is None and call.is_causal and length > 1
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        end = min(stop, slots) if triangle else slots  # keys after a causal block's end are unseen
        scores = call.q[:, :, start:stop].float() @ keys[:, :, :end].transpose(-1, -2)
        scores *= call.scaling
        at = torch.arange(end, device=scores.device) if columns is None else columns[..., :end]
        if call.score_mod is not None:
            scores = _modified(call, scores, queries[start:stop], at)
        if triangle:
            seen = torch.arange(start, stop, device=scores.device)[:, None]
            scores.masked_fill_(seen < torch.arange(end, device=scores.device), -torch.inf)
        elif call.mask is not None:
            scores.masked_fill_(~call.mask[:, :, start:stop], -torch.inf)
        weights = _softmax(scores, call.sinks)
        if real is not None:
            weights = weights * real[:, None, start:stop, None]
        yield weights, queries[start:stop], at


def _modified(call: Call, scores: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    assert call.score_mod is not None
    batch, heads = scores.shape[:2]
    device = scores.device
    return call.score_mod(
        scores,
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(heads, device=device)[None, :, None, None],
        queries[:, None],
        keys if keys.ndim == 1 else keys[:, :, None],
    )


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax whose rows without any allowed key are zero."""
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    nothing = scores.amax(dim=-1, keepdim=True) == -torch.inf
    return scores.softmax(dim=-1).masked_fill_(nothing, 0.0)
