"""Tensors that grow along their tokens without copying the whole for every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

#: Room made for tokens to come, as a share of those held: a copy of the whole every so many tokens.
SHARE = 64


class Growing:
    """A tensor [batch, heads, tokens, width] to which tokens are appended in place.

    Room is made for 1/64 of what is held, so that memory stays within two per cent of need and a token
    costs far less than the copy of the whole that concatenation makes. What is shared with a fork is
    never written to.
    """

    def __init__(self, filled: Shaped[Tensor, "batch heads tokens width"]) -> None:
        self._room = filled
        self._count = filled.shape[2]
        self._own = False
        self._seen = False

    @property
    def tensor(self) -> Shaped[Tensor, "batch heads tokens width"]:
        """What is filled."""
        return self._room if self._count == self._room.shape[2] else self._room[:, :, : self._count]

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken, room included."""
        return self._room.nbytes

    @property
    def room(self) -> Shaped[Tensor, "batch heads room width"]:
        """What is filled, and the room for tokens to come."""
        return self._room

    @property
    def count(self) -> int:
        """Tokens that are filled."""
        return self._count

    @property
    def owned(self) -> bool:
        """Whether the room may be written to: nothing else is known to look at it."""
        return self._own

    def reserve(self, tokens: int) -> None:
        """Have room of one's own for so many tokens; what is not filled is zero, and no NaN."""
        if not self._own or tokens > self._room.shape[2]:
            self._make_room(self._count, max(0, tokens - self._count))
        self._room[:, :, self._count :].zero_()

    def advance(self) -> None:
        """One token more is filled: it was written into the room from elsewhere."""
        self._count += 1

    def move(self, room: Shaped[Tensor, "batch heads room width"]) -> None:
        """Lie in this room from now on, which nothing else looks at."""
        if self._room is not room:
            room[:, :, : self._count] = self.tensor
            self._room, self._own = room, True

    def append(
        self, more: Shaped[Tensor, "batch heads new width"], beside: int = 0, coming: int = 0
    ) -> None:
        """Put tokens behind those that are there.

        Args:
            more: the tokens.
            beside: tokens that are held elsewhere.
            coming: tokens that are known to come behind these.
        """
        count = self._count + more.shape[2]
        if torch.is_grad_enabled() and (more.requires_grad or self._room.requires_grad):
            self._room, self._own = torch.cat([self.tensor, more], dim=2), False
        else:
            if not self._own or count > self._room.shape[2]:
                share = (count + beside) // SHARE if self._count else 0
                self._make_room(count, max(share, coming))
            self._room[:, :, self._count : count] = more
        self._count = count

    def _make_room(self, count: int, spare: int) -> None:
        batch, heads, _, width = self._room.shape
        shape, pinned = (batch, heads, count + spare, width), self._room.is_pinned()
        room = self._room.new_empty(shape, pin_memory=pinned)
        room[:, :, : self._count] = self.tensor
        self._room, self._own, self._seen = room, True, False

    def put(
        self,
        more: Shaped[Tensor, "batch heads new width"],
        at: Int[Tensor, "batch heads"],
        counts: Int[Tensor, "batch heads"],
        beside: int = 0,
    ) -> None:
        """Put the first `counts` tokens of each row and head behind its first `at`."""
        need = int((at + counts).max()) - self._count
        if need > 0:
            self.append(more.new_zeros(*more.shape[:2], need, more.shape[3]), beside)
        elif not self._own:
            self._make_room(self._count, 0)
        new = torch.arange(more.shape[2], device=more.device)
        there = new < counts[..., None]
        row, head, token = there.nonzero(as_tuple=True)
        self._room[row, head, at[row, head] + token] = more[there]

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Rows in another order, where they lie unless something else looks at them."""
        moved = self.tensor.index_select(0, rows.to(self._room.device))
        if self._own and not self._seen:
            self._room[:, :, : self._count] = moved
        else:
            self._room, self._own, self._seen = moved, True, False

    def show(self) -> None:
        """Something else looks at what is filled now, which may grow in place but not change."""
        self._seen = True

    def fork(self) -> Growing:
        """Another that shares the memory until one of them grows."""
        other = Growing(self.tensor)
        self._own = False
        return other

    def changed(self, change: Callable[[Tensor], Tensor]) -> Growing:
        """What `change` makes of the filled part."""
        return Growing(change(self.tensor))
