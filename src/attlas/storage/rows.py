"""Padding, worked out once: which tokens of each row are real, and how many stand before each."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Rows:
    """The rows of a batch, of which tokens have been seen.

    A token's *column* is its place in its row, padding included; its *rank* counts real tokens alone.

    Args:
        real: which of the tokens are no padding; more than have been seen may be told. None when all are.
        seen: tokens seen, padding included.
    """

    def __init__(self, real: Bool[Tensor, "batch told"] | None, seen: int) -> None:
        self.real: Bool[Tensor, "batch seen"] | None = None if real is None else real[:, :seen]
        self.seen = seen

    @cached_property
    def _ranks(self) -> Int[Tensor, "batch seen"]:
        assert self.real is not None
        return self.real.long().cumsum(dim=-1) - 1

    def at(
        self, columns: Int[Tensor, "batch *heads slots"]
    ) -> tuple[Bool[Tensor, "batch *heads slots"], Int[Tensor, "batch *heads slots"]]:
        """(whether a real token stands there, its rank) for columns; −1 is an empty slot."""
        there, at = columns >= 0, columns.clamp(min=0).long()
        if self.real is None:
            return there, at
        size = (*at.shape[:-1], self.seen)
        across = (slice(None), *(None for _ in at.shape[1:-1]))
        real, ranks = (x.to(at.device)[across].expand(size) for x in (self.real, self._ranks))
        return there & real.gather(-1, at), ranks.gather(-1, at)

    def last(
        self, count: int, batch: int, device: torch.device
    ) -> tuple[Int[Tensor, "batch count"], Bool[Tensor, "batch count"]]:
        """(rank, whether it is real) of the last tokens."""
        first = self.seen - count
        if self.real is None:
            rank = torch.arange(first, self.seen, device=device).expand(batch, -1)
            return rank, torch.ones_like(rank, dtype=torch.bool)
        return self._ranks[:, first:].to(device), self.real[:, first:].to(device)

    def totals(self, batch: int, device: torch.device) -> Int[Tensor, " batch"]:
        """Real tokens of each row."""
        if self.real is None:
            return torch.full((batch,), self.seen, device=device)
        return self.real.sum(dim=-1).to(device)

    def counts(self, batch: int) -> list[int]:
        """`totals` as numbers, which asks the device."""
        return [self.seen] * batch if self.real is None else self.real.sum(dim=-1).tolist()

    def of_keys(self, keys: int) -> Bool[Tensor, "batch keys"] | None:
        """Which of the first `keys` columns hold a real token, for masks; None when all do."""
        if self.real is None:
            return None
        return torch.nn.functional.pad(self.real, (0, max(0, keys - self.seen)))[:, :keys]

    def aligned(
        self,
        x: Tensor,
        columns: Int[Tensor, "batch heads slots"] | None = None,
    ) -> Tensor:
        """x [batch, heads, slots, dim] with each row's real tokens first, in their order.

        Args:
            x: slots, of which all heads hold the same.
            columns: of the slots; slot and column are the same unless given.
        """
        if columns is None and self.real is None:
            return x
        if columns is None:
            assert self.real is not None
            return left_aligned(x, self.real[:, : x.shape[2]].to(x.device))
        return left_aligned(x, self.at(columns[:, 0])[0])


def left_aligned(x: Tensor, there: Bool[Tensor, "batch n"]) -> Tensor:
    """x [batch, heads, n, dim] with what is there first in each row, in its order."""
    order = (~there).long().sort(dim=1, stable=True).indices
    return x.gather(2, order[:, None, :, None].expand_as(x))
