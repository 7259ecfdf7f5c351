"""Padding, worked out once: which tokens of each row are valid, and how many stand before each."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Rows:
    """The rows of a batch, of which tokens have been seen.

    A token's *column* is its place in its row, padding included; its *rank* counts valid tokens alone.

    Args:
        valid: which of the tokens are no padding; more than were seen may be told. None when all are.
        seen: tokens seen, padding included.
    """

    def __init__(self, valid: Bool[Tensor, "batch told"] | None, seen: int) -> None:
        self.valid: Bool[Tensor, "batch seen"] | None = None if valid is None else valid[:, :seen]
        self.seen = seen

    @cached_property
    def _ranks(self) -> Int[Tensor, "batch seen"]:
        assert self.valid is not None
        return self.valid.long().cumsum(dim=-1) - 1

    def at(
        self, columns: Int[Tensor, "batch *heads slots"]
    ) -> tuple[Bool[Tensor, "batch *heads slots"], Int[Tensor, "batch *heads slots"]]:
        """(whether a valid token stands there, its rank) for columns; −1 is an empty slot."""
        there, at = columns >= 0, columns.clamp(min=0).long()
        if self.valid is None:
            return there, at
        size = (*at.shape[:-1], self.seen)
        across = (slice(None), *(None for _ in at.shape[1:-1]))
        valid, ranks = (x.to(at.device)[across].expand(size) for x in (self.valid, self._ranks))
        return there & valid.gather(-1, at), ranks.gather(-1, at)

    def last(
        self, count: int, batch: int, device: torch.device
    ) -> tuple[Int[Tensor, "batch count"], Bool[Tensor, "batch count"]]:
        """(rank, whether it is valid) of the last tokens."""
        first = self.seen - count
        if self.valid is None:
            rank = torch.arange(first, self.seen, device=device).expand(batch, -1)
            return rank, torch.ones_like(rank, dtype=torch.bool)
        return self._ranks[:, first:].to(device), self.valid[:, first:].to(device)

    def totals(self, batch: int, device: torch.device) -> Int[Tensor, " batch"]:
        """Real tokens of each row."""
        if self.valid is None:
            return torch.full((batch,), self.seen, device=device)
        return self.valid.sum(dim=-1).to(device)

    def counts(self, batch: int) -> list[int]:
        """`totals` as numbers, which asks the device."""
        return [self.seen] * batch if self.valid is None else self.valid.sum(dim=-1).tolist()

    def of_keys(self, keys: int) -> Bool[Tensor, "batch keys"] | None:
        """Which of the first `keys` columns hold a valid token, for masks; None when all do."""
        if self.valid is None:
            return None
        return torch.nn.functional.pad(self.valid, (0, max(0, keys - self.seen)))[:, :keys]

    def aligned(
        self,
        x: Tensor,
        columns: Int[Tensor, "batch heads slots"] | None = None,
    ) -> Tensor:
        """x [batch, heads, slots, dim] with each row's valid tokens first, in their order.

        Args:
            x: slots, of which all heads hold the same.
            columns: of the slots; slot and column are the same unless given.
        """
        if columns is None and self.valid is None:
            return x
        if columns is None:
            assert self.valid is not None
            return left_aligned(x, self.valid[:, : x.shape[2]].to(x.device))
        return left_aligned(x, self.at(columns[:, 0])[0])


def left_aligned(x: Tensor, there: Bool[Tensor, "batch n"]) -> Tensor:
    """x [batch, heads, n, dim] with what is there first in each row, in its order."""
    order = (~there).long().sort(dim=1, stable=True).indices
    return x.gather(2, order[:, None, :, None].expand_as(x))
