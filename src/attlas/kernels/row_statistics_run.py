"""Calls of the kernels for statistics of attention rows."""

from __future__ import annotations

from math import e, log2
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import room
from attlas.kernels.row_statistics import _columns, _rows
from attlas.ops.row_features import MASSES, PLAIN


class Call:
    """The kernels of one call, with what both take.

    Args:
        q: [batch, heads, queries, dim].
        k: [batch, kv_heads, keys, dim], of one type with q.
        mask: booleans that broadcast to [batch, heads, queries, keys], or None.
        causal: query i sees keys up to i + offset.
        scale: of the products.
        offset: position of the first query.
    """

    def __init__(
        self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, offset: int
    ) -> None:
        self.q, self.k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        self.batch, self.heads, self.queries, self.dim = q.shape
        self.keys, self.offset, self.factor = k.shape[2], offset, scale * log2(e)
        size = (self.batch, self.heads, self.queries, self.keys)
        self.mask = None if mask is None else mask.expand(size)
        masked = (0, 0, 0, 0) if self.mask is None else self.mask.stride()
        self.strides = (*self.q.stride()[:3], *self.k.stride()[:3], *masked)
        exact = torch.get_float32_matmul_precision() == "highest"
        small = self.dim > 128 or q.itemsize > 2
        self.fixed: dict[str, Any] = {
            "DIM": self.dim, "DIM_ROOM": room(self.dim), "QUERIES": 64 if small else 128,
            "KEYS": 32 if small else 64, "CAUSAL": causal, "MASK": mask is not None,
            "PRECISION": "ieee" if q.itemsize == 2 or exact else "tf32",
            "num_warps": 4 if small else 8, "num_stages": 2 if small else 3,
        }  # fmt: skip

    def rows(
        self, until: Tensor, ids: tuple[Tensor, ...] | None, low: float, peak_at: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """([statistics, batch, heads, queries] before sink logits and padding, the largest scores in
        base 2, keys of the peaks).

        Args:
            until: keys before it are a row's first tokens, [batch].
            ids: of the queries and of the tokens behind them [batch, queries], of the keys and of the
                tokens before them [batch, keys].
            low: the score of hidden pairs, and the lse of rows that see nothing.
            peak_at: whether the keys of the peaks are looked for.
        """
        size = self.q.shape[:3]
        found = self.q.new_empty(3 + (PLAIN if ids is None else len(MASSES)), *size, dtype=torch.float32)
        tops = torch.empty_like(found[0])
        peaks = torch.empty(size, dtype=torch.int32, device=self.q.device) if peak_at else None
        taken = (self.q,) * 4 if ids is None else ids
        grid = (triton.cdiv(self.queries, self.fixed["QUERIES"]), self.heads, self.batch)
        with torch.cuda.device_of(self.q):  # Triton launches on the current device
            _rows[grid](
                self.q, self.k, self.q if self.mask is None else self.mask, *taken,
                until.int().contiguous(), found, tops, tops if peaks is None else peaks,
                *self._sizes(), self.factor, low, size.numel(), *self.strides, IDS=ids is not None,
                PEAK=peak_at, **self.fixed,
            )  # fmt: skip
        return found, tops, None if peaks is None else peaks.long()

    def columns(self, tops: Tensor, shares: Tensor, low: float) -> Tensor:
        """[batch, heads, keys], what each key receives of rows whose weights are 2^(t − top) · share."""
        received = tops.new_empty(*self.q.shape[:2], self.keys)
        grid = (triton.cdiv(self.keys, self.fixed["KEYS"]), self.heads, self.batch)
        with torch.cuda.device_of(self.q):
            _columns[grid](
                self.q, self.k, self.q if self.mask is None else self.mask,
                tops, shares.contiguous(), received, *self._sizes(), self.factor, low, *self.strides,
                **self.fixed,
            )  # fmt: skip
        return received

    def _sizes(self) -> tuple[int, ...]:
        return self.queries, self.keys, self.offset, self.heads, self.heads // self.k.shape[1]
