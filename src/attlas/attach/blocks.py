"""Attention weights in blocks of queries, exactly as the model's own eager attention has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach.call import Call

#: Scores held at once: 32 MiB in float32.
BLOCK = 2**23


def weight_blocks(
    call: Call, size: int | None = None, heads: Sequence[int] | None = None
) -> Iterator[
    tuple[
        Float[Tensor, "batch heads query keys"],
        Int[Tensor, " query"],
        Int[Tensor, " keys"] | Int[Tensor, "batch heads keys"],
    ]
]:
    """Yield (weights, columns of the queries, columns of the keys) for successive queries.

    weights = softmax(mod(q kᵀ · scaling), masked), in float32 at least; with sink logits the softmax runs
    over them too, and what parts do to weights is done. Memory is `size` scores whatever the length.

    Args:
        call: whose queries and keys.
        size: scores held at once; `BLOCK` unless given.
        heads: query heads that are wanted; all unless given, or where parts change weights.
    """
    heads = None if call.changers else heads
    which = torch.arange(call.q.shape[1]) if heads is None else torch.tensor(heads)
    which = which.to(call.q.device)
    q = call.q if heads is None else call.q[:, which]
    batch, count, length, _ = q.shape
    slots = call.k.shape[2]
    rows = max(1, (BLOCK if size is None else size) // max(1, batch * count * slots))
    wide = torch.promote_types(call.q.dtype, torch.float32)
    keys = call.k.to(wide)[:, which // call.groups]
    columns = (
        None
        if call.original_positions is None
        else call.original_positions[:, which // call.groups]
    )
    mask = call.mask
    if mask is not None and heads is not None and mask.shape[1] > 1:
        mask = mask[:, which]
    queries, valid = call.queries, call.valid
    triangle, before = mask is None and call.is_causal and length > 1, slots - length
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        end = before + stop if triangle else slots  # keys after a causal block's end are unseen
        scores = q[:, :, start:stop].to(wide) @ keys[:, :, :end].transpose(-1, -2)
        scores *= call.scaling
        at = torch.arange(end, device=scores.device) if columns is None else columns[..., :end]
        if call.score_mod is not None:
            scores = _modified(call, scores, which, queries[start:stop], at)
        if triangle:
            seen = torch.arange(before + start, before + stop, device=scores.device)[:, None]
            hidden = seen < torch.arange(end, device=scores.device)
            scores.masked_fill_(hidden, -torch.inf)
        elif mask is not None:
            scores.masked_fill_(~mask[:, :, start:stop], -torch.inf)
        weights = _softmax(scores, None if call.sinks is None else call.sinks[which])
        if valid is not None:
            weights = weights * valid[:, None, start:stop, None]
        for part in call.changers:
            weights = part.normalize(call, weights, queries[start:stop], at)
        yield weights, queries[start:stop], at


def _modified(call: Call, scores: Tensor, heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    assert call.score_mod is not None
    device = scores.device
    return call.score_mod(
        scores,
        torch.arange(scores.shape[0], device=device)[:, None, None, None],
        heads[None, :, None, None],
        queries[:, None],
        keys if keys.ndim == 1 else keys[:, :, None],
    )


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax whose rows without any allowed key are zero."""
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    nothing = scores.detach().amax(dim=-1, keepdim=True) == -torch.inf
    if not scores.requires_grad:
        return scores.softmax(dim=-1).masked_fill_(nothing, 0.0)
    # A row that sees nothing would have a gradient of NaN.
    return scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
