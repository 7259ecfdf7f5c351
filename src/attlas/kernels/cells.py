"""Scores of listed blocks: the largest product of any query of a row with any key of a block.

    out[row, c] = max q_i · k_j        i in the row, j in block at[row, c]

A program takes one row of one head and goes over its blocks, so many at once that their keys are a tile.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

#: Keys of a tile.
KEYS = 128


@triton.jit(do_not_specialize=["rows", "cells"])
@no_type_check
def _cells(
    q, k, at, out, rows, cells, heads, group, q_b, q_h, q_r, q_n, k_b, k_h, k_c, k_n,
    QUERIES: tl.constexpr, ROOM: tl.constexpr, SIZE: tl.constexpr, MANY: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """One row of queries."""
    row, of = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = of // heads, of % heads
    i, c, d = tl.arange(0, ROOM), tl.arange(0, MANY * SIZE), tl.arange(0, DIM)
    q += batch * q_b + head * q_h + row * q_r
    k += batch * k_b + head // group * k_h
    at += (of * rows + row) * cells
    out += (of * rows + row) * cells
    asks = tl.load(q + i[:, None] * q_n + d[None, :], mask=i[:, None] < QUERIES, other=0.0)
    for first in range(0, cells, MANY):
        cell = first + c // SIZE
        block = tl.load(at + cell, mask=cell < cells, other=0).to(tl.int64)
        keys = tl.load(k + (block * k_c + c % SIZE * k_n)[:, None] + d[None, :])
        products = tl.dot(asks, tl.trans(keys), input_precision="ieee")
        products = tl.where(i[:, None] < QUERIES, products, float("-inf"))
        best = tl.max(tl.reshape(tl.max(products, 0), (MANY, SIZE)), 1)
        place = first + tl.arange(0, MANY)
        tl.store(out + place, best, mask=place < cells)


def best_products(q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """Scores [batch, heads, rows, cells] in float32, of rows [batch, heads, rows, queries, dim] with the
    blocks `at` of keys [batch, kv_heads, blocks, size, dim]."""
    batch, heads, rows, queries, dim = q.shape
    size, cells = k.shape[3], at.shape[3]
    at = at.to(torch.int32).contiguous()
    out = torch.empty(at.shape, device=q.device, dtype=torch.float32)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _cells[rows, batch * heads](
            q, k, at, out, rows, cells, heads, heads // k.shape[1], *q.stride()[:4], *k.stride()[:4],
            QUERIES=queries, ROOM=max(16, triton.next_power_of_2(queries)), SIZE=size,
            MANY=max(1, KEYS // size), DIM=dim, num_warps=4, num_stages=2,
        )  # fmt: skip
    return out
