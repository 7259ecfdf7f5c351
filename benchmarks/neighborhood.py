"""Neighbourhood attention by tiles beside full and masked attention, and what the simulator allows."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from attlas import masks, ops
from attlas.masks.neighborhood import axes_of
from attlas.masks.tiles import best_tiles, visits
from attlas.ops.neighborhood import CPU, CUDA
from common import paired_ratio, save, show

#: (shape, window, stride); in the first three every visited tile is visible throughout.
ON_CPU = [
    ((8192,), (1024,), (128,)), ((64, 64), (24, 48), (8, 16)), ((96, 96), (16, 16), (16, 16)),
    ((64, 64), (13, 13), (1, 1)), ((16, 16, 16), (5, 5, 5), (1, 1, 1)),
]  # fmt: skip
ON_GPU = [
    ((32768,), (2048,), (128,)), ((128, 128), (24, 48), (8, 16)), ((128, 128), (16, 16), (16, 16)),
    ((128, 128), (13, 13), (1, 1)), ((32, 32, 32), (8, 8, 8), (1, 1, 1)),
]  # fmt: skip


def row(
    shape: tuple[int, ...], window: Any, stride: Any, device: str, rounds: int
) -> dict[str, object]:
    """One pattern: ratios of pairs of runs, in one process."""
    make: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else None}
    axes, heads = axes_of(shape, window, stride), 24 if device == "cuda" else 2
    q, k, v = (torch.randn(1, heads, math.prod(shape), 64, **make) for _ in range(3))
    told = visits(axes, *best_tiles(axes, *(CUDA if device == "cuda" else CPU)))
    dense = masks.dense(masks.neighborhood(shape, window, stride=stride), *[q.shape[2]] * 2)
    dense = dense.to(device)

    def tiles() -> object:
        return ops.neighborhood(q, k, v, shape=shape, window=window, stride=stride)

    full = paired_ratio(tiles, lambda: ops.attend(q, k, v), rounds=rounds, device=device)
    masked = paired_ratio(
        tiles, lambda: scaled_dot_product_attention(q, k, v, attn_mask=dense), rounds=rounds,
        device=device,
    )  # fmt: skip
    return show({
        "what": "neighborhood", "shape": shape, "window": window, "stride": stride, "heads": heads,
        "whole": told.whole, "share": told.share, "allowed": told.speedup, "ms": full["ours_ms"],
        "full_ms": full["theirs_ms"], "masked_ms": masked["theirs_ms"],
        "times faster than full": 1 / full["ratio"],
        "times faster than masked": 1 / masked["ratio"],
        "of what is allowed": 1 / full["ratio"] / told.speedup,
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    cells = ON_GPU if given.device == "cuda" else ON_CPU
    rows = [row(*cell, given.device, given.rounds) for cell in cells]
    save("neighborhood", given.device, rows)


if __name__ == "__main__":
    main()
