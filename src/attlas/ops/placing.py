"""`place_token`: a token's key and value are written where a number on the device says.

A recorded step cannot know in Python how many tokens there are before it. On a GPU one small kernel
writes both; elsewhere it is an `index_copy_` of each.
"""

from __future__ import annotations

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from attlas.ops.decode_kernels import has_kernels

#: Types that a kernel copies as they are.
COPIED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def place_token(
    keys: Shaped[Tensor, "batch kv_heads slots dim"],
    values: Shaped[Tensor, "batch kv_heads slots v_dim"],
    slot: Int[Tensor, " one"],
    k: Shaped[Tensor, "batch kv_heads 1 dim"],
    v: Shaped[Tensor, "batch kv_heads 1 v_dim"],
) -> None:
    """Write one token's key and value into the room for them.

    Args:
        keys: room for keys.
        values: room for values.
        slot: where the token goes; the caller sees to it that there is room.
        k: the token's keys.
        v: its values.
    """
    if placing_refused(keys, values, slot, k, v) is None:
        from attlas.kernels.placing import place

        with torch.cuda.device_of(keys):
            place(keys, values, slot, k, v)
    else:
        keys.index_copy_(2, slot, k)
        values.index_copy_(2, slot, v)


def placing_refused(keys: Tensor, values: Tensor, slot: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot write a token."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if any(not t.is_cuda or t.device != keys.device for t in (keys, values, slot, k, v)):
        return "not all on one CUDA device"
    for whole, one in ((keys, k), (values, v)):
        if one.dtype != whole.dtype or one.dtype not in COPIED:
            return f"a token of {one.dtype} for room of {whole.dtype}"
        if one.shape != (*whole.shape[:2], 1, whole.shape[3]):
            return f"a token of {tuple(one.shape)} for room of {tuple(whole.shape)}"
        if one.stride(-1) != 1 or whole.stride(-1) != 1:
            return "numbers do not lie one behind the other"
    if keys.shape[:3] != values.shape[:3]:
        return f"room of {tuple(keys.shape)} for keys and {tuple(values.shape)} for values"
    if slot.shape != (1,):
        return f"{slot.numel()} slots"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (keys, values, k, v)):
        return "gradients are wanted"
    return None if has_kernels(keys.device) else "there is no Triton for the device"
