"""Scores of blocks of keys for rows of queries, by a kernel where there is one."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.ops.decode_kernels import has_kernels
from attlas.tracing import traced

#: Numbers of keys that are gathered at once, which bounds the memory; on a GPU, where many small
#: products leave it idle.
AT_ONCE, ON_GPU = 1 << 24, 1 << 28
#: Widths of heads, tokens of the largest block, queries of a row and rows of heads that the kernel takes.
WIDTHS, LARGEST, QUERIES, PLACES = (16, 32, 64, 128, 256), 128, 128, 65535


def block_products(
    q: Float[Tensor, "batch heads rows queries dim"],
    k: Float[Tensor, "batch kv_heads blocks size dim"],
    at: Int[Tensor, "batch heads rows cells"],
) -> Float[Tensor, "batch heads rows cells"]:
    """The largest product of a row's queries with the keys of each of its blocks; not differentiable.

    Args:
        q: queries, in rows.
        k: blocks of keys; their heads divide the query heads.
        at: numbers of the blocks of each row, all of which are there.
    """
    if refuses(q, k, at) is None:
        from attlas.kernels.cells import best_products

        found: Tensor = best_products(q, k, at)
        return found
    batch, heads, rows, cells = at.shape
    kv_heads, blocks, size, dim = k.shape[1:]
    flat = k.reshape(-1, size * dim)
    own = torch.arange(batch * kv_heads, device=k.device).view(batch, kv_heads, 1, 1, 1) * blocks
    index = at.unflatten(1, (kv_heads, -1)) + own
    grouped = q.unflatten(1, (kv_heads, -1))
    held = AT_ONCE if k.device.type == "cpu" else ON_GPU
    step = max(1, held // max(1, batch * heads * cells * size * dim))
    parts = []
    for row in range(0, rows, step):
        keys = flat[index[:, :, :, row : row + step]].unflatten(-1, (size, dim)).flatten(-3, -2)
        products = (grouped[:, :, :, row : row + step] @ keys.mT).amax(-2)
        parts.append(products.unflatten(-1, (cells, size)).amax(-1))
    scores: Tensor = torch.cat(parts, dim=3).flatten(1, 2)
    return scores


def refuses(q: Tensor, k: Tensor, at: Tensor) -> str | None:
    """Why the kernel cannot take a call, None when it can."""
    if traced() or not all(x.is_cuda for x in (q, k, at)):
        return "not on a CUDA device"
    if q.dtype != k.dtype or q.dtype.itemsize > 4:
        return f"queries and keys are {q.dtype} and {k.dtype}"
    size, dim = k.shape[3:]
    if dim not in WIDTHS or size > LARGEST or size & (size - 1) or q.shape[3] > QUERIES:
        return f"heads are {dim} wide, rows have {q.shape[3]} queries and blocks {size} keys"
    if q.stride(-1) != 1 or k.stride(-1) != 1 or not at.numel():
        return "channels do not lie side by side, or there is nothing to score"
    if q.shape[0] * q.shape[1] > PLACES:
        return f"{q.shape[0] * q.shape[1]} rows of heads, at most {PLACES}"
    return None if has_kernels(q.device) else "there is no Triton for the device"
