"""A token's key and value, written into room at a slot that the device knows: one launch for both.

    keys[b, h, slot] = k[b, h, 0]        values[b, h, slot] = v[b, h, 0]

A program copies one head of one row. What lies outside of the room is not written.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import room


# The slots of a model's layers are numbers of one tensor, aligned or not.
@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=["slot"])
@no_type_check
def _place(
    keys, values, k, v, slot, slots, keys_b, keys_h, keys_n, values_b, values_h, values_n,
    k_b, k_h, v_b, v_h,
    DIM: tl.constexpr, DIM_ROOM: tl.constexpr, V_DIM: tl.constexpr, V_ROOM: tl.constexpr,
):  # fmt: skip
    """One head's key and value."""
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c, d = tl.arange(0, DIM_ROOM), tl.arange(0, V_ROOM)
    key = tl.load(k + batch * k_b + head * k_h + c, mask=c < DIM, other=0.0)
    value = tl.load(v + batch * v_b + head * v_h + d, mask=d < V_DIM, other=0.0)
    at = tl.load(slot).to(tl.int64)
    keys += batch * keys_b + head * keys_h + at * keys_n
    values += batch * values_b + head * values_h + at * values_n
    if (at >= 0) & (at < slots):
        tl.store(keys + c, key, mask=c < DIM)
        tl.store(values + d, value, mask=d < V_DIM)


def place(keys: Tensor, values: Tensor, slot: Tensor, k: Tensor, v: Tensor) -> None:
    """Write a token [batch, kv_heads, 1, width] into room [batch, kv_heads, slots, width] at `slot`."""
    batch, heads, slots, dim = keys.shape
    v_dim = values.shape[-1]
    _place[heads, batch](
        keys, values, k, v, slot, slots, *keys.stride()[:3], *values.stride()[:3], *k.stride()[:2],
        *v.stride()[:2], DIM=dim, DIM_ROOM=room(dim), V_DIM=v_dim, V_ROOM=room(v_dim), num_warps=1,
    )  # fmt: skip
