"""Recorders of sums over the tokens of one sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attlas.attach.call import ForwardPass
from attlas.attach.part import Recorder
from attlas.errors import UserError
from attlas.parts.record.rows import repeated

#: Calls of so few tokens are remembered token by token until the next one, since they may be taken back.
FEW = 64


class SumRecorder(Recorder):
    """Adds up what each token gives, under keys of the recorder's own.

    The record is of one sequence and grows while a cache carries it on.
    """

    def setup(self) -> None:
        """Nothing is recorded yet."""
        super().setup()
        self._sums: dict[Any, Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        """The last call can be taken back no more."""
        self._before: dict[Any, Tensor | None] = {}
        self._last: dict[Any, list[Tensor]] = {}
        self._offset, self._length = 0, 0

    def begin(self, forward_pass: ForwardPass) -> None:
        """A call without a past begins a new sequence."""
        if forward_pass.offset == 0:
            self._sums.clear()
        self._forget()
        self._offset, self._length = forward_pass.offset, forward_pass.length

    def add(
        self, key: Any, total: Float[Tensor, batch *sum], each: Callable[[], list[Tensor]]
    ) -> None:
        """Add what some tokens of the call give; sums may grow along their last axis.

        Args:
            key: of the sum.
            total: what they give together.
            each: gives what each of them gives, asked for where tokens could be taken back.
        """
        known = self._sums.get(key)
        if self._length <= FEW:
            if key not in self._last:
                self._before[key], self._last[key] = known, []
            self._last[key] += each()
        self._sums[key] = total if known is None else _plus(known, total, self)

    def take_back(self, seen: int) -> None:
        """Take off what the last tokens gave.

        Raises:
            ValueError: more tokens than the last call had, or than are remembered one by one.
        """
        left = seen - self._offset
        if left < 0 or self._length > FEW:
            raise UserError(
                f"{type(self).__name__} adds up over the tokens, and can take back those of the last "
                f"call alone, and at most {FEW}; it holds {self._offset + self._length} and {seen} stay"
            )
        for key, each in self._last.items():
            found = self._before[key]
            for one in each[:left]:
                found = one if found is None else _plus(found, one, self)
            if found is None:
                del self._sums[key]
            else:
                self._sums[key] = found
            self._last[key] = each[:left]
        self._length = left


def _plus(a: Tensor, b: Tensor, who: Recorder) -> Tensor:
    """The sum, the shorter with zeros behind it, fewer rows repeated."""
    a = repeated(a, b.shape[0], who)
    width = max(a.shape[-1], b.shape[-1])
    a, b = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (a, b))
    return torch.add(a, b)
