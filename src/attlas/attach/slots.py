"""Slots and columns: which token stands in each slot of a cache, and masks in terms of slots."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attlas.attach.call import Call
from attlas.attach.under import recording
from attlas.errors import UserError
from attlas.ops.segments import listed
from attlas.storage.layer import Chosen, StoredLayer


def original_positions_of(call: Call) -> Int[Tensor, "batch kv_heads keys"] | None:
    """Original positions of each slot of any cache layer; None where slot and column are the same."""
    layer = call.cache_layer
    if (told := getattr(layer, "original_positions", None)) is not None:
        columns: Tensor | None = told()
        if columns is None or columns.shape[1] == call.k.shape[1]:
            return columns
        # Keys that the model made of what is cached: no part has dropped other tokens in one head.
        return columns[:, :1].expand(-1, call.k.shape[1], -1)
    first = call.forward_pass.windows.get(call.source, 0)
    if not first:
        return None
    batch, heads, slots = call.k.shape[:3]
    return torch.arange(first, first + slots, device=call.k.device).expand(batch, heads, -1)


def in_original_positions(
    call: Call, mask: Bool[Tensor, "batch mask_heads query columns"] | None
) -> Bool[Tensor, "batch some_heads query keys"] | None:
    """The model's mask for the slots that are there.

    The mask of a layer that drops tokens speaks of all columns, that of a window of its slots.
    """
    columns = call.original_positions
    if columns is None or not isinstance(call.cache_layer, StoredLayer):
        return mask
    there = columns >= 0
    if mask is None:
        if call.q.shape[2] > 1 and call.is_causal:
            there = there[:, :, None] & (columns[:, :, None] <= call.queries[:, None])
        elif not recording() and bool(there.all()):
            return None
        else:
            there = there[:, :, None]
    else:
        at = columns.clamp(min=0).long()
        if mask.shape[1] > 1:
            at, there = (x.repeat_interleave(call.groups, dim=1) for x in (at, there))
        batch, kv_heads, slots = at.shape
        size = (batch, kv_heads, call.q.shape[2])
        at = at[:, :, None].expand(*size, slots)
        there = mask.expand(*size, mask.shape[-1]).gather(3, at) & there[:, :, None]
    if there.shape[1] != call.q.shape[1]:
        there = there.repeat_interleave(call.groups, dim=1)
    return there.expand(-1, -1, call.q.shape[2], -1)


def shown(call: Call, chosen: Chosen) -> Bool[Tensor, "batch heads 1 keys"]:
    """Which slots a choice reads."""
    slots = call.k.shape[2]
    at, there = listed(chosen.index, chosen.page, chosen.slots, None)
    seen = torch.zeros(*at.shape[:2], slots + 1, dtype=torch.bool, device=at.device)
    seen.scatter_(2, torch.where(there[:, :, 0], at, slots).long(), True)
    seen = seen[..., :slots]
    seen[..., chosen.slots :] = True
    return seen.repeat_interleave(call.q.shape[1] // seen.shape[1], dim=1)[:, :, None]


def boolean(mask: Tensor | None) -> Tensor | None:
    """The mask, if it is of booleans.

    Raises:
        ValueError: a mask of numbers.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise UserError(
            f"attach takes a boolean attention mask (True = may attend), got one of {mask.dtype}; "
            "give the 2-D mask of 0 and 1, or a boolean 4-D one"
        )
    return mask


def both(call: Call, extra: Tensor | None) -> Bool[Tensor, "batch mask_heads query keys"] | None:
    """The mask in force and a part's, where one has none also the causal one that it implies."""
    if extra is None:
        return call.mask
    query, slots = call.q.shape[2], call.k.shape[2]
    mask = call.mask
    if mask is None and call.is_causal and query > 1:
        mask = torch.ones(query, slots, dtype=torch.bool, device=extra.device)
        mask = mask.tril(slots - query)[None, None]
    joined = extra if mask is None else mask & extra
    heads = joined.shape[1] if joined.ndim == 4 else 1
    return joined.expand(call.q.shape[0], heads, query, slots)
