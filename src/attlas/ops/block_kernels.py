"""Listed blocks by Triton kernels: when they may be taken, and their call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attlas.masks import Mask, causal
from attlas.masks.algebra import And
from attlas.masks.patterns import Padding
from attlas.ops.block_work import Work
from attlas.ops.decode_kernels import has_kernels
from attlas.tracing import traced

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Widths of heads; tokens of the largest block that is one tile, and of the smallest block of keys;
#: rows of heads of a launch; numbers of all lists.
NARROW, WIDE, TILE, FEW, PLACES, LISTED = 16, 256, 128, 16, 65535, 2**31
#: Bytes of shared memory that a program takes at most.
SHARED = 162 * 1024


def refuses(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: tuple[int, int], mask: Mask | None,
    scale: float,
) -> str | None:  # fmt: skip
    """Why the kernels cannot take a call, None when they can."""
    if traced():
        return "tensors stand for others"
    if not all(x.is_cuda for x in (q, k, v, blocks)):
        return "not on a CUDA device"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all of one of {DTYPES}"
    if (why := _refuses_shape(q, k, v, blocks, size)) is not None:
        return why
    if scale <= 0.0:
        return f"scale is {scale}, not above 0"
    held = inside(mask)
    if held is None:
        return f"inside the blocks holds {mask!r}, which is not causal, padding, or both"
    valid = held[1]
    if valid is not None and (valid.shape[0] != q.shape[0] or valid.shape[1] < k.shape[2]):
        return f"padding tells of {list(valid.shape)}, not of {q.shape[0]} rows of {k.shape[2]} keys"
    if not has_kernels(q.device):
        return "there is no Triton for the device"
    device: Any = torch.cuda.get_device_properties(q.device)
    shared = device.shared_memory_per_block_optin
    return f"{shared} bytes of shared memory, not {SHARED}" if shared < SHARED else None


def _refuses_shape(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: tuple[int, int]
) -> str | None:
    width = q.shape[-1]
    if v.shape[-1] != width or not NARROW <= width <= WIDE:
        return f"heads are {width} and {v.shape[-1]} wide, not alike from {NARROW} to {WIDE}"
    if not all(_fits(n) for n in size) or size[1] < FEW:
        return f"blocks have {size} tokens, not powers of two, of keys from {FEW}, or multiples of {TILE}"
    if not q.numel() or not k.numel():
        return "there is nothing to compute"
    if q.shape[0] * q.shape[1] > PLACES:
        return f"{q.shape[0] * q.shape[1]} rows of heads, at most {PLACES}"
    # Of all lists, each padded by the number of blocks, as the gradients count them.
    there = blocks.shape[0] * blocks.shape[1] * (-(-k.shape[2] // size[1]) + 1)
    if max(blocks.numel(), there) >= LISTED:
        return f"lists of {max(blocks.numel(), there)} numbers, fewer than {LISTED}"
    return None


def _fits(tokens: int) -> bool:
    return tokens % TILE == 0 or (tokens <= TILE and tokens & (tokens - 1) == 0)


def inside(mask: Mask | None) -> tuple[bool, Tensor | None] | None:
    """(Whether the future is hidden, which keys are valid) of a mask that says no more; else None."""
    if mask is None:
        return False, None
    if mask == causal:
        return True, None
    if isinstance(mask, Padding):
        return False, mask.held
    if not isinstance(mask, And):
        return None
    left, right = inside(mask.left), inside(mask.right)
    if left is None or right is None or (left[1] is not None and right[1] is not None):
        return None
    return left[0] or right[0], right[1] if left[1] is None else left[1]


def attended(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: tuple[int, int], mask: Mask | None,
    bias: Tensor | None, scale: float, q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of a call that `refuses` gives no reason against; differentiable."""
    from attlas.kernels.block_sparse_run import BlockSparse, Listed

    held = inside(mask)
    assert held is not None
    hides, valid = held
    if valid is not None:
        valid = valid.to(q.device, torch.bool)
        valid = valid if valid.stride(-1) == 1 else valid.contiguous()
    listed = Listed(blocks, size, hides, valid, scale, q_offset)

    work = Work(blocks, size, mask, scale, q_offset, *q.shape[1:3], *k.shape[1:3])
    rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        found: tuple[Tensor, Tensor] = BlockSparse.apply(*rows, bias, listed, work)  # type: ignore[no-untyped-call]
    return found
