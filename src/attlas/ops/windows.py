"""Attention in very many short windows, as Swin Transformer has it, with its bias and its shift mask.

    out_r = softmax(q_r k_rᵀ · scale + B + M_{r mod windows}) v_r        r: a window of an image

B [heads, N, N] comes from a table of relative positions; M hides from each other what only the shift of
the image brought into one window. On a GPU a kernel holds all N² pairs of a window on the chip and
takes the width of the heads in tiles, forward and backward (see `attlas.kernels.windows`); elsewhere, and
where windows have more than 128 tokens, SDPA takes the windows of an image as so many heads.

Cost: 4·N²·d operations a window and head; with the kernel, memory of q, k, v and the output alone.
Reduces to softmax attention of each window without bias and mask.
Source: "Flash Window Attention: speedup the attention computation for Swin Transformer".
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attlas.catalog.kinds import OP
from attlas.catalog.registry import mechanism
from attlas.ops.decode_kernels import has_kernels
from attlas.ops.reference import softmax

#: Tokens of a window, and width of a head, that the kernel takes.
TOKENS, WIDTH = 128, 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@mechanism("flash-window-attention", aliases=("swin-window-attention",), kind=OP)
def window_attend(
    q: Float[Tensor, "rows heads tokens dim"],
    k: Float[Tensor, "rows heads tokens dim"],
    v: Float[Tensor, "rows heads tokens v_dim"],
    *,
    bias: Float[Tensor, "heads tokens tokens"] | None = None,
    mask: Bool[Tensor, "windows tokens tokens"] | Float[Tensor, "windows tokens tokens"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "rows heads tokens v_dim"]:
    """Attention inside every window; rows that see nothing give 0.

    Args:
        q: queries; a row is a window of an image, all windows of an image behind one another.
        k: keys.
        v: values.
        bias: added to the scores of every window.
        mask: of each window of an image: True visible, or numbers that are added, 0 seen, −∞ hidden.
            It gets no gradient.
        scale: of the products; 1/√dim unless given.

    Raises:
        ValueError: shapes that do not fit each other, or a mask that wants a gradient.
    """
    _check(q, k, v, bias, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    added = None
    if mask is not None:
        added = mask if mask.dtype != torch.bool else _added(mask, q.dtype)
    if refuses(q, k, v, bias) is not None:
        return side_by_side(q, k, v, bias, added, scale)
    from attlas.kernels.windows_run import Windows

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    more = (None if x is None else x.contiguous() for x in (bias, added))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        out: Tensor = Windows.apply(q, k, v, *more, scale, plain)  # type: ignore[no-untyped-call]
    return out


def plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    """The definition, with the scores of all windows in memory; the mask in numbers."""
    scores = (q * scale) @ k.mT
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return softmax(scores).to(v.dtype) @ v


def side_by_side(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    """One call of SDPA, to which the windows of an image are heads with biases of their own."""
    rows, heads, tokens, _ = q.shape
    windows = 1 if mask is None else len(mask)
    q, k, v = (x.reshape(rows // windows, windows * heads, tokens, x.shape[-1]) for x in (q, k, v))
    added = None if bias is None else bias[None]
    if mask is not None:
        added = mask[:, None] if added is None else added + mask[:, None]
    if added is None:
        return scaled_dot_product_attention(q, k, v, scale=scale)
    added = added.to(q.dtype).expand(windows, heads, tokens, tokens).flatten(0, 1)[None]
    out = scaled_dot_product_attention(q, k, v, added, scale=scale)
    if mask is not None:  # SDPA's kernels disagree on rows that see nothing
        out = out.masked_fill(added.detach().amax(-1, keepdim=True) == -torch.inf, 0.0)
    return out.reshape(rows, heads, tokens, v.shape[-1])


def refuses(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernel cannot take a call, None when it can."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if not q.is_cuda:
        return "not on a CUDA device"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all of one of {DTYPES}"
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    if q.dtype == torch.float32 and trained:
        return "gradients of 32-bit numbers take it twice as long as SDPA"
    if q.shape[2] > TOKENS:
        return f"windows have {q.shape[2]} tokens, at most {TOKENS}"
    if max(q.shape[-1], v.shape[-1]) > WIDTH:
        return f"heads are {q.shape[-1]} and {v.shape[-1]} wide, at most {WIDTH}"
    if bias is not None and not bias.is_floating_point():
        return f"bias is {bias.dtype}"
    if not q.numel() or not v.numel():
        return "there is nothing to compute"
    return None if has_kernels(q.device) else "there is no Triton for the device"


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    rows, heads, tokens, dim = q.shape
    for name, x, wanted in (("k", k, (rows, heads, tokens, dim)), ("v", v, (rows, heads, tokens))):
        if tuple(x.shape[: len(wanted)]) != wanted:
            raise ValueError(f"{name} must have the windows of q {list(q.shape)}, got {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (heads, tokens, tokens):
        raise ValueError(f"bias must be [{heads}, {tokens}, {tokens}], got {list(bias.shape)}")
    if mask is None:
        return
    if mask.ndim != 3 or tuple(mask.shape[1:]) != (tokens, tokens) or not len(mask):
        raise ValueError(f"mask must be [windows, {tokens}, {tokens}], got {list(mask.shape)}")
    if rows % len(mask):
        raise ValueError(f"mask is of {len(mask)} windows, which must divide the {rows} rows of q")
    if mask.requires_grad:
        raise ValueError("mask gets no gradient; what is trained is given as bias")


def _added(visible: Bool[Tensor, "*pairs"], dtype: torch.dtype) -> Float[Tensor, "*pairs"]:
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -torch.inf)


# What Swin gives it ------------------------------------------------------------------------------------


def partition(
    x: Float[Tensor, "batch height width channels"], size: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
) -> Float[Tensor, "rows tokens channels"]:  # fmt: skip
    """The windows of images that were shifted up and left, row by row of each image.

    Raises:
        ValueError: windows that do not divide the image.
    """
    if x.shape[1] % size[0] or x.shape[2] % size[1]:
        raise ValueError(f"size={size} must divide height and width, got {list(x.shape[1:3])}")
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    return rearrange(x, "b (r h) (c w) d -> (b r c) (h w) d", h=size[0], w=size[1])


def joined(
    windows: Float[Tensor, "rows tokens channels"], size: tuple[int, int], grid: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
) -> Float[Tensor, "batch height width channels"]:  # fmt: skip
    """The images of height and width `grid` that `partition` took apart."""
    x = rearrange(
        windows, "(b r c) (h w) d -> b (r h) (c w) d", r=grid[0] // size[0], c=grid[1] // size[1],
        h=size[0],
    )  # fmt: skip
    return x.roll(shift, (1, 2)) if any(shift) else x


def shift_mask(
    grid: tuple[int, int], size: tuple[int, int], shift: tuple[int, int],
    device: torch.device | None = None,
) -> Bool[Tensor, "windows tokens tokens"]:  # fmt: skip
    """True between tokens of a window that are neighbours in the image too, before it was shifted."""
    parts = []
    for length, block, by in zip(grid, size, shift, strict=True):
        at = torch.arange(length, device=device)
        # The last windows hold what the shift moved behind the end; the others are of one part.
        parts.append((at >= length - block).int() + (at >= length - by).int() if by else 0 * at)
    part = partition((3 * parts[0][:, None] + parts[1])[None, ..., None].float(), size)[..., 0]
    return part[:, :, None] == part[:, None]


def relative_bias(
    table: Float[Tensor, "distances heads"], size: tuple[int, int]
) -> Float[Tensor, "heads tokens tokens"]:
    """The bias of all pairs of a window from a table of (2·height − 1) · (2·width − 1) distances.

    Raises:
        ValueError: a table of another number of distances.
    """
    height, width = size
    if len(table) != (2 * height - 1) * (2 * width - 1):
        raise ValueError(
            f"table must have {(2 * height - 1) * (2 * width - 1)} distances for {size}, got {len(table)}"
        )
    at = torch.arange(height * width, device=table.device)
    rows, columns = at // width, at % width
    down = rows[:, None] - rows + height - 1
    across = columns[:, None] - columns + width - 1
    return table[down * (2 * width - 1) + across].permute(2, 0, 1)
