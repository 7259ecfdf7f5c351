"""Which part of the cache a layer reads: its own, another layer's, or one that it makes keys of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.attach.state import Attachment
from attlas.errors import UserError
from attlas.storage.layer import StoredLayer


def filled(held: Attachment, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values up to the last query's own, for causal calls without a mask.

    A static cache gives its empty room too. Behind what is left out the last query stands at the last
    key, also in layers that read another's keys and are given the last queries alone.
    """
    queries, keys = query.shape[2], key.shape[2]
    forward_pass = held.forward_pass
    seen = queries if forward_pass is None else forward_pass.offset + (forward_pass.length or queries)
    if not 1 < queries < keys or keys <= seen:
        return key, value
    return key[:, :, :seen], value[:, :, :seen]


def mask_of_chosen(chosen: Tensor | None, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of a layer whose model chose which keys each query reads.

    Args:
        chosen: their slots, [batch, queries, chosen], -1 for none.
        key: whose third axis is the slots.
        mask: the model's, booleans or numbers that are added.
    """
    if chosen is None:
        return mask
    slots = key.shape[2]
    at = torch.where(chosen < 0, slots, chosen).long()
    read = torch.zeros(*chosen.shape[:2], slots + 1, dtype=torch.bool, device=key.device)
    read = read.scatter_(-1, at, True)[:, None, :, :slots]
    if mask is None:
        return read
    return mask & read if mask.dtype == torch.bool else mask.masked_fill(~read, -torch.inf)


def refuse_joined(module: nn.Module, mask: Tensor | None) -> None:
    """Refuse layers that append numbers to the mask, which in a mask of booleans mean the opposite.

    Raises:
        ValueError: by the module's name.
    """
    if mask is not None and mask.dtype == torch.bool and getattr(module, "compressor", None):
        raise UserError(
            f"attach cannot honour the compressed keys of {type(module).__name__}: it joins numbers to "
            "a mask of booleans, and hides what it means to show; use the model's eager attention"
        )


def done_with(held: Attachment, call: Call) -> Call | None:
    """The call whose cache layer is read no more in this pass, None where layers to come share it.

    What a part does with a layer's keys it does when all that share them have read them.
    """
    last = held.last_readers.get(call.source)
    if last is None or held.forward_pass is None:
        return call
    waiting: dict[int, Call] = held.forward_pass.shared.setdefault("shared keys", {})
    if call.layer == call.source:
        waiting[call.source] = call
    return waiting.pop(call.source, None) if call.layer == last else None


def refuse_strangers(call: Call) -> None:
    """Refuse keys that are not those that parts work on in the cache, which would answer for them.

    Raises:
        ValueError: by layer and module, with both shapes.
    """
    layer = call.cache_layer
    if not isinstance(layer, StoredLayer) or not layer.learned or layer.latent:
        return
    keys, values = layer.keys, layer.values
    given = call.k.shape[1], call.k.shape[-1], call.v.shape[-1]
    if keys is None or values is None:
        raise UserError(_stranger(call, "nothing"))
    if given != (keys.shape[1], keys.shape[-1], values.shape[-1]):
        heads = f"{keys.shape[1]} heads of {keys.shape[-1]} and {values.shape[-1]} channels"
        raise UserError(_stranger(call, heads))


def _stranger(call: Call, held: str) -> str:
    return (
        f"layer {call.layer} ({type(call.module).__name__}) attends to keys and values of "
        f"{call.k.shape[1]} heads of {call.k.shape[-1]} and {call.v.shape[-1]} channels, its cache "
        f"holds {held}; parts that work on the cache cannot be attached to this model"
    )
