"""`block_sparse`: attention to listed blocks of keys.

    out_i = softmax({scale · q_i·k_j + bias_j : j // k_block in blocks[i // q_block], mask(i, j)}) · v

| route     | takes it when                                                                     |
|-----------|-----------------------------------------------------------------------------------|
| reference | always; all scores in memory                                                        |
| gather    | not where tensors stand for others; for each block of queries its blocks of keys     |
| scatter   | likewise; for each block of keys the queries that list it, where these are few        |
| kernel    | a CUDA device with Triton, blocks of powers of two, causal, padding or no mask        |
| packed    | lists of single tokens, no bias, masks as the kernel; the kernel's way for few rows    |

A row that sees nothing gives 0 and lse = −∞. Several calls over disjoint keys are joined by `merge`.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas import masks
from attlas.errors import UnknownName
from attlas.masks import Mask
from attlas.masks.algebra import And
from attlas.masks.pages import check_lists, sizes
from attlas.ops import block_kernels
from attlas.ops.block_gather import gather
from attlas.ops.block_packed import packed
from attlas.ops.block_reference import plainly
from attlas.ops.block_scatter import scatter
from attlas.ops.block_work import Work
from attlas.tracing import traced

BlockRoute = Literal["auto", "reference", "gather", "scatter", "kernel", "packed"]
BLOCK_ROUTES: tuple[BlockRoute, ...] = (
    "auto", "reference", "gather", "scatter", "kernel", "packed",
)  # fmt: skip

#: Rows that share a list, below which blocks of keys are not gathered for them.
FEW = 16


@overload
def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, size: int | tuple[int, int],
    mask: Mask | None = ..., bias: Tensor | None = ..., scale: float | None = ...,
    q_offset: int | None = ..., return_lse: Literal[False] = ..., route: BlockRoute = ...,
) -> Tensor: ...  # fmt: skip
@overload
def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, size: int | tuple[int, int],
    mask: Mask | None = ..., bias: Tensor | None = ..., scale: float | None = ...,
    q_offset: int | None = ..., return_lse: Literal[True], route: BlockRoute = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def block_sparse(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch v_heads keys v_dim"],
    blocks: Int[Tensor, "_ _ _ _"],
    *,
    size: int | tuple[int, int],
    mask: Mask | None = None,
    bias: Float[Tensor, "_ _ _"] | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    return_lse: bool = False,
    route: BlockRoute = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each block of queries to its listed blocks of keys; differentiable.

    Args:
        q: queries.
        k: keys; their heads divide the query heads.
        v: values, with as many heads.
        blocks: [batch or 1, 1 or key heads or heads, q_blocks, count], numbers of the key blocks that
            each block of queries meets, ascending, −1 behind the last.
        size: tokens of a block, or of a block of queries and of one of keys. The last block of either
            side may hold fewer.
        mask: a pattern that holds inside the listed blocks.
        bias: [batch or 1, key heads or 1, keys], added to the scaled scores of a key, as the log of how
            many keys a pooled one stands for.
        scale: of the products; 1/√dim unless given.
        q_offset: position of the first query; `keys - queries` unless given.
        return_lse: give log Σ exp(scores) [batch, heads, queries] too.
        route: "auto", or one route by name.

    Raises:
        TypeError: lists that are not of whole numbers.
        ValueError: lists of another shape, unsorted, with a block twice or outside, or under `causal`
            wholly in the future of their queries; or a route that cannot take the call.
    """
    if route not in BLOCK_ROUTES:
        raise UnknownName("route", route, BLOCK_ROUTES)
    size = sizes(size)
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    check_call(q, k, v, blocks, size, bias)
    if not traced():
        check_lists(blocks)
        _check_range(blocks, size, k.shape[2], offset, mask)
    out, lse = listed(q, k, v, blocks, size, mask, bias, scale=scale, q_offset=offset, route=route)
    return (out, lse) if return_lse else out


def listed(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: tuple[int, int], mask: Mask | None,
    bias: Tensor | None = None, *, scale: float | None = None, q_offset: int, route: BlockRoute = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of lists that are known to be well formed: nothing is asked of the device."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if route == "reference" or (route != "kernel" and traced()):
        return plainly(q, k, v, blocks, size, mask, bias, scale, q_offset)
    few = q.shape[1] // max(blocks.shape[1], k.shape[1]) * size[0] < FEW
    if route in ("auto", "kernel", "packed"):
        why = block_kernels.refuses(q, k, v, blocks, size, mask, scale)
        packs = _packs(size, mask, bias)
        if route == "packed" and packs is not None:
            raise ValueError(f"route='packed' cannot take this call: {packs}")
        if route == "packed" or (route == "auto" and few and why is None and packs is None):
            return _packed(q, k, v, blocks, size[1], mask, scale, q_offset)
        if why is None:
            return block_kernels.attended(q, k, v, blocks, size, mask, bias, scale, q_offset)
        if route == "kernel":
            raise ValueError(f"route='kernel' cannot take this call: {why}")
    work = Work(blocks.long(), size, mask, scale, q_offset, *q.shape[1:3], *k.shape[1:3])
    if route == "scatter" or (route == "auto" and few):
        return scatter(q, k, v, bias, work)
    return gather(q, k, v, bias, work)


def _packs(size: tuple[int, int], mask: Mask | None, bias: Tensor | None) -> str | None:
    """Why lists of single tokens cannot be packed, None when they can."""
    if size[0] != 1:
        return f"blocks have {size[0]} queries, not 1"
    if bias is not None:
        return "keys have a bias"
    return None if block_kernels.inside(mask) else f"{mask!r} is not causal, padding, or both"


def _packed(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int, mask: Mask | None, scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    held = block_kernels.inside(mask)
    assert held is not None
    hides, valid = held
    beside = None if valid is None else masks.padding(valid)

    def attended(
        q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: tuple[int, int], causal: bool, offset: int
    ) -> tuple[Tensor, Tensor]:
        within = masks.both(masks.causal if causal else None, beside)
        return listed(q, k, v, blocks, size, within, scale=scale, q_offset=offset)

    return packed(q, k, v, blocks, size, hides, q_offset, attended)


def check_call(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: tuple[int, int], bias: Tensor | None
) -> None:
    """Nothing, if shapes go together.

    Raises:
        ValueError: they do not.
    """
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v take [batch, heads, tokens, dim], keys and values alike, got {shapes}")
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    if q.shape[-1] != k.shape[-1] or k.shape[0] != batch:
        raise ValueError(f"k must be of q's batch and width, got {list(k.shape)} and {list(q.shape)}")
    if heads % kv_heads:
        raise ValueError(f"heads of k must divide those of q ({heads}), got {kv_heads}")
    rows = -(-queries // size[0])
    fits = blocks.ndim == 4 and blocks.shape[0] in (1, batch) and blocks.shape[2] == rows
    if not fits or blocks.shape[1] not in (1, kv_heads, heads):
        raise ValueError(
            f"blocks takes [1 or {batch}, 1, {kv_heads} or {heads}, {rows}, count] for {queries} "
            f"queries in blocks of {size[0]}, got {list(blocks.shape)}"
        )
    if bias is None:
        return
    wanted = ((1, batch), (1, kv_heads), (keys,))
    if bias.ndim != 3 or any(n not in of for n, of in zip(bias.shape, wanted, strict=True)):
        raise ValueError(
            f"bias takes [1 or {batch}, 1 or {kv_heads}, {keys}], got {list(bias.shape)}"
        )


def _check_range(
    blocks: Tensor, size: tuple[int, int], keys: int, offset: int, mask: Mask | None
) -> None:
    """Refuse blocks that are not there, or that no query of theirs can see."""
    there = -(-keys // size[1])
    last = offset + size[0] * torch.arange(1, blocks.shape[2] + 1, device=blocks.device) - 1
    future = (blocks * size[1] > last[:, None]).any() if hides_future(mask) else blocks.new_zeros(())
    highest, late = torch.stack([blocks.max(), future.to(blocks.dtype)]).tolist()
    if highest >= there:
        raise ValueError(
            f"blocks must lie in 0..{there - 1} ({keys} keys in blocks of {size[1]}), got {highest}"
        )
    if late:
        raise ValueError("blocks lists a block that is in the future of all its queries, under causal")


def hides_future(mask: Mask | None) -> bool:
    """Whether a pattern is `causal`, or `causal` and something else."""
    if isinstance(mask, And):
        return hides_future(mask.left) or hides_future(mask.right)
    return mask == masks.causal
