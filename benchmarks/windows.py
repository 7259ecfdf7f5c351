"""Attention in short windows, with Swin's bias and shift mask, beside PyTorch's fused attention.

The rival is one call of `scaled_dot_product_attention` for all windows, whose mask holds bias and shift
mask of each window of an image and is read anew for every image; it is made before the clock starts.
Forwards, and forwards with backwards, alternately in pairs. On a CPU, which has no
kernel for it, what the call costs beside SDPA's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attlas.ops.windows import refuses, shift_mask, window_attend
from common import paired_ratio, save, show

#: Side of a window, windows along an image, images, heads and their width: Swin-T's stages at 224²
#: pixels, and at 256² with windows of 8 × 8.
SHAPES = (
    (7, 8, 64, 3, 32), (7, 4, 64, 6, 32), (7, 2, 64, 12, 32), (8, 8, 64, 3, 32), (8, 4, 64, 6, 32),
    (8, 8, 16, 4, 64), (8, 8, 16, 2, 128),
)  # fmt: skip


def fused(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    """All windows of an image side by side, as so many heads; `added` is [windows · heads, N, N]."""
    q, k, v = (x.reshape(-1, len(added), *x.shape[2:]) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, added[None])


def trained(run: Callable[[], Tensor], leaves: list[Tensor], up: Tensor) -> None:
    """A forward and a backward pass."""
    out = run()
    torch.autograd.grad(out, leaves, up.reshape(out.shape))


def compared(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, rounds: int
) -> list[dict[str, object]]:
    """Rows of a forward pass and of both passes."""
    side, along, images, heads, width = shape
    rows, tokens, grid = images * along**2, side * side, (side * along, side * along)
    qkv = torch.randn(rows, tokens, 3, heads, width, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
    q, k, v = (x.requires_grad_() for x in qkv.unbind())
    bias = torch.randn(heads, tokens, tokens, device=device, dtype=dtype).requires_grad_()
    seen = shift_mask(grid, (side, side), (side // 2, side // 2), torch.device(device))
    hidden = torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill(~seen, -torch.inf)
    added = (bias.detach() + hidden[:, None]).flatten(0, 1).requires_grad_()
    ours = partial(window_attend, q, k, v, bias=bias, mask=hidden)
    theirs = partial(fused, q, k, v, added)
    apart = (ours().reshape(theirs().shape).double() - theirs().double()).abs().max().item()
    up = torch.randn_like(v)
    what = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "apart": apart,
            "refused": refuses(q, k, v, bias) or ""}  # fmt: skip
    with torch.no_grad():
        forward = paired_ratio(ours, theirs, rounds=rounds, device=device)
    both = paired_ratio(
        partial(trained, ours, [q, k, v, bias], up), partial(trained, theirs, [q, k, v, added], up),
        rounds=rounds, device=device,
    )  # fmt: skip
    return [show({**what, "passes": "forward", **forward}), show({**what, "passes": "both", **both})]


def main() -> None:
    """All shapes in bfloat16 and float16, and in float32."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    rows = []
    for shape in SHAPES if device == "cuda" else [(7, 2, 2, 3, 32)]:
        for dtype in dtypes:
            rows += compared(shape, dtype, device, options.rounds)
    save("windows", device, rows)


if __name__ == "__main__":
    main()
