"""When the kernel of biases' gradients may be taken, which tiles of a mask it visits, and its call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attlas.masks import Mask, full, grid
from attlas.masks.kept import kept_by_mask
from attlas.ops.decode_kernels import has_kernels
from attlas.ops.flex import WIDTH

if TYPE_CHECKING:
    from attlas.kernels.toeplitz_run import Work

#: Pairs of the tiles that a mask cuts, up to which they are held: 64 MiB. The edges of a pattern have as
#: many as there are tokens times the width of a tile.
PAIRS = 1 << 26
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot take a call, None when it can."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if not q.is_cuda:
        return "not on a CUDA device"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all of one of {DTYPES}"
    if k.shape[1] != v.shape[1]:
        return "keys and values have different numbers of heads"
    if max(q.shape[-1], v.shape[-1]) > WIDTH:
        return f"heads are {q.shape[-1]} and {v.shape[-1]} wide, at most {WIDTH}"
    if not q.numel() or not k.numel() or not v.numel():
        return "there is nothing to compute"
    return None if has_kernels(q.device) else "there is no Triton for the device"


def gradient(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, out: Tensor, lse: Tensor, d_out: Tensor | None,
    d_lse: Tensor | None, work: Work, scale: float, offset: int,
) -> Tensor:  # fmt: skip
    """The gradient of a table, see `attlas.kernels.toeplitz_run.gradient`."""
    from attlas.kernels import toeplitz_run

    q, k, v, out = (_rows(x) for x in (q, k, v, out))
    d_out = None if d_out is None else _rows(d_out)
    lse, d_lse = lse.float().contiguous(), None if d_lse is None else d_lse.float().contiguous()
    tile = toeplitz_run.tile_of(max(q.shape[-1], v.shape[-1]), q.itemsize)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        found = toeplitz_run.gradient(
            q, k, v, table, out, lse, d_out, d_lse, work, tile, scale, offset
        )
    return found.to(table.dtype)


def _rows(x: Tensor) -> Tensor:
    """Channels next to each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def work_of(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, offset: int) -> Work | None:
    """The tiles that the kernel visits for a call; None where a pattern cuts too many of them."""
    from attlas.kernels.toeplitz_run import tile_of, walked

    batch, heads, queries, dk = q.shape
    keys, tile = k.shape[2], tile_of(max(dk, v.shape[-1]), q.itemsize)
    tiles = -(-queries // tile.queries) * -(-keys // tile.keys) * heads * batch
    return _work(
        full if mask is None else mask, queries, keys, offset, (tile.queries, tile.keys),
        walked(tiles, q.device), q.device,
    )  # fmt: skip


@kept_by_mask(16)
def _work(
    mask: Mask, queries: int, keys: int, offset: int, size: tuple[int, int], longest: int,
    device: torch.device,
) -> Work | None:  # fmt: skip
    """Visible tiles by pattern and stripe, those that are cut behind the others, and the items."""
    from attlas.kernels.toeplitz_run import Work

    (q_size, k_size), steps = size, size[0] // size[1]
    some, every = grid(
        mask, queries, keys, q_block=q_size, k_block=k_size, q_offset=offset, device=device
    )
    every = every.clone()
    every[..., -1, :] &= queries % q_size == 0
    every[..., :, -1] &= keys % k_size == 0
    batches, heads, q_blocks, k_blocks = some.shape
    if int((some & ~every).sum()) * q_size * k_size > PAIRS:
        return None
    least, count = -(q_blocks - 1) * steps, k_blocks + (q_blocks - 1) * steps
    b, h, i, j = some.nonzero(as_tuple=True)
    whole = every[b, h, i, j]
    stripe = (b * heads + h) * count + j - i * steps - least
    order = ((stripe * 2 + ~whole) * q_blocks + i).argsort()
    b, h, i, j, whole, stripe = (x[order] for x in (b, h, i, j, whole, stripe))
    tiles = stripe.bincount(minlength=batches * heads * count)
    uncut = stripe[whole].bincount(minlength=len(tiles))
    # Each stripe's tiles in pieces of `longest`.
    pieces = -(-tiles // longest)
    stripes = _begins(pieces)
    owner = torch.arange(len(tiles), device=device).repeat_interleave(pieces)
    start = tiles.cumsum(0)[owner] - tiles[owner]
    first = start + (torch.arange(len(owner), device=device) - stripes[owner]) * longest
    stop = torch.minimum(first + longest, start + tiles[owner])
    half = torch.minimum(torch.maximum(start + uncut[owner], first), stop)
    begins = stripes[::count]
    pattern = owner // count
    ordered = (pattern * (longest + 1) + longest - (stop - first)).argsort(stable=True)
    slots = torch.empty_like(ordered)
    slots[ordered] = torch.arange(len(ordered), device=device)
    slots -= begins[pattern]
    cut = ~whole
    seen = _seen(mask, b[cut], h[cut], i[cut], j[cut], size, queries, keys, offset)
    items = torch.stack((owner % count, first, half, stop), dim=1)
    i, numbers, items, ordered, slots, begins, stripes = (
        x.to(torch.int32).contiguous()
        for x in (i, cut.cumsum(0) - 1, items, ordered, slots, begins, stripes)
    )
    return Work(
        i, numbers, seen, items, ordered, slots, begins, stripes, count, least,
        max(1, int(begins.diff().max())), (batches > 1, heads > 1),
    )  # fmt: skip


def _begins(counts: Tensor) -> Tensor:
    """Where each of several runs of so many begins, and where the last ends."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _seen(
    mask: Mask, b: Tensor, h: Tensor, i: Tensor, j: Tensor, size: tuple[int, int], queries: int,
    keys: int, offset: int,
) -> Tensor:  # fmt: skip
    """Which pairs of these tiles are visible and within the texts [tiles, queries, keys], as bytes."""
    q = i[:, None, None] * size[0] + torch.arange(size[0], device=i.device)[:, None]
    k = j[:, None, None] * size[1] + torch.arange(size[1], device=j.device)
    inside = (q < queries) & (k < keys)
    # A mask over a tensor cannot be asked about what lies behind it.
    q, k = q.clamp(max=queries - 1) + offset, k.clamp(max=keys - 1)
    seen = mask.visible(b[:, None, None], h[:, None, None], q, k) & inside
    return seen.to(torch.uint8).contiguous()
