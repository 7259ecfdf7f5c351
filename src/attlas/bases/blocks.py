"""Blocks of keys that queries choose: where blocks lie among a row's tokens, and the mask of a choice.

    block(j) = ⌊rank(j) / size⌋      rank = how many valid tokens of its row stand before it

Blocks are cut by each row's own valid tokens, so that padding is in none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas import masks, ops
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.storage.rows import left_aligned
from attlas.tracing import traced


@dataclass(frozen=True)
class Blocks:
    """Which block each key and each query of a call stands in.

    Attributes:
        size: tokens of a block.
        of_keys: block of each key, [1 or batch, keys].
        of_queries: block of each query.
        valid: which keys are no padding; None when all are.
    """

    size: int
    of_keys: Int[Tensor, "rows keys"]
    of_queries: Int[Tensor, "rows queries"]
    valid: Bool[Tensor, "batch keys"] | None

    @classmethod
    def of(cls, inputs: Inputs, q: Tensor, k: Tensor, size: int) -> Blocks:
        """Those of a call in which the last query stands at the last key."""
        queries, keys, valid = q.shape[2], k.shape[2], inputs.valid
        if valid is None:
            rank = torch.arange(keys, device=k.device)[None]
        else:
            valid = valid[:, -keys:]
            rank = (valid.cumsum(-1) - 1).clamp(min=0)
        return cls(size, rank // size, rank[:, keys - queries :] // size, valid)

    @property
    def count(self) -> int:
        """Blocks that may be there."""
        return -(-self.of_keys.shape[1] // self.size)

    def means(
        self, k: Float[Tensor, "batch kv_heads keys dim"]
    ) -> Float[Tensor, "batch kv_heads blocks dim"]:
        """The mean of each block's keys; 0 of a block that holds none."""
        if self.valid is None:
            return ops.page_means(k, self.size)
        held = left_aligned(k.masked_fill(~self.valid[:, None, :, None], 0.0), self.valid)
        first = torch.arange(self.count, device=k.device) * self.size
        there = (self.valid.sum(-1, keepdim=True) - first).clamp(0, self.size)
        short = self.count * self.size - k.shape[2]
        whole = torch.tensor([self.size] * (self.count - 1) + [self.size - short], device=k.device)
        scaled = (whole / there.clamp(min=1)).to(k.dtype)
        means: Tensor = ops.page_means(held, self.size) * scaled[:, None, :, None]
        return means

    def best(
        self, scores: Float[Tensor, "batch heads queries blocks"], count: int
    ) -> Int[Tensor, "batch heads queries chosen"]:
        """The `count` blocks of largest score of each query, ascending, −1 behind the last."""
        chosen: Tensor = ops.best_pages(scores.flatten(1, 2), count).unflatten(1, scores.shape[1:3])
        return chosen

    def seen(
        self, chosen: Int[Tensor, "batch heads queries chosen"], base: Mask | Tensor | None
    ) -> Mask | Bool[Tensor, "batch heads queries keys"]:
        """The pairs of chosen blocks within `base`, as lists where these can be read as they are."""
        queries, keys = self.of_queries.shape[1], self.of_keys.shape[1]
        if self.valid is None and not traced() and not isinstance(base, Tensor):
            listed: Mask = masks.Pages(chosen, (1, self.size), first=keys - queries)
            return listed if base is None else listed & base
        table = chosen.new_zeros(*chosen.shape[:3], self.count + 1, dtype=torch.bool)
        table = table.scatter(-1, torch.where(chosen < 0, self.count, chosen).long(), True)
        at = self.of_keys[:, None, None].expand(*chosen.shape[:3], -1)
        pairs = table.gather(-1, at)
        within = ops.as_dense(base, queries, keys, keys - queries, chosen.device)
        seen: Tensor = pairs if within is None else pairs & within
        return seen
