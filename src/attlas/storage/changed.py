"""Codes of changed numbers: rotated by a Hadamard matrix, or shifted by a constant per channel.

Both are undone while the codes are read, run by run, so that attention sees keys and values as they
were but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.ops.quantize import Codes
from attlas.ops.reference import repeated
from attlas.ops.segments import Block, Coded
from attlas.storage.body import Body
from attlas.storage.coded import CodedBody
from attlas.storage.growing import Growing


@dataclass(frozen=True)
class Changed:
    """A coded segment of which keys and values are changed once they are numbers."""

    coded: Coded
    keys: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]
    extra: int = 0

    @property
    def nbytes(self) -> int:
        """Codes and what the change takes."""
        return self.coded.nbytes + self.extra

    def blocks(self, queries: int, size: int) -> Iterator[Block]:
        """Runs of slots, changed back."""
        for k, v, seen, bias in self.coded.blocks(queries, size):
            yield self.keys(k), self.values(v), seen, bias


def rotated(x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """x times an orthonormal Walsh–Hadamard matrix, which undoes itself.

    Over all channels where their number is a power of two, else over each run of the largest power
    of two that divides it.
    """
    matrix = _hadamard(x.shape[-1] & -x.shape[-1]).to(x)
    found: Tensor = (x.unflatten(-1, (-1, matrix.shape[0])) @ matrix).flatten(-2)
    return found


@cache
def _hadamard(size: int) -> Float[Tensor, "size size"]:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    orthonormal: Tensor = matrix / size**0.5
    return orthonormal


class TurnedBody(CodedBody):
    """Codes of keys and values that were `turned`."""

    kind = "turned"

    def segment(self, index: Tensor | None = None, page: int = 1) -> Changed:  # type: ignore[override]
        """All slots, or those of the listed pages, turned back."""
        return Changed(super().segment(index, page), rotated, rotated)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as numbers."""
        return rotated(self.k.read()), rotated(self.v.read())


class ShiftedBody(CodedBody):
    """Codes of keys and values from which a constant per channel was taken.

    Args:
        k: the keys' codes.
        v: the values'.
        index: original positions, −1 behind the last of a shorter row; None for `first` and on.
        first: column of slot 0 where there is no index.
        shifts: what was taken from keys and from values.
    """

    kind = "shifted"

    def __init__(
        self,
        k: Codes,
        v: Codes,
        index: Int[Tensor, "batch kv_heads slots"] | None = None,
        first: int = 0,
        *,
        shifts: tuple[
            Float[Tensor, "batch kv_heads 1 dim"], Float[Tensor, "batch kv_heads 1 v_dim"]
        ],
    ) -> None:
        super().__init__(k, v, index, first)
        self.held |= {"k.shift": Growing(shifts[0]), "v.shift": Growing(shifts[1])}

    @property
    def shifts(self) -> tuple[Tensor, Tensor]:
        """What is added to keys and to values."""
        return self.held["k.shift"].tensor, self.held["v.shift"].tensor

    def group(self, name: str) -> int:
        """As for all codes; a shift stands for all tokens."""
        return 0 if name.endswith("shift") else super().group(name)

    def alike(self, other: Body) -> bool:
        """Whether the other holds codes of the same formats, with the same shifts."""
        if not isinstance(other, ShiftedBody) or not super().alike(other):
            return False
        return all(torch.equal(a, b) for a, b in zip(self.shifts, other.shifts, strict=True))

    def segment(self, index: Tensor | None = None, page: int = 1) -> Changed:  # type: ignore[override]
        """All slots, or those of the listed pages, shifted back."""
        k, v = self.shifts
        extra = sum(t.nbytes for t in (k, v))
        return Changed(
            super().segment(index, page),
            lambda x: x + repeated(k, x.shape[1]).to(x.dtype),
            lambda x: x + repeated(v, x.shape[1]).to(x.dtype),
            extra,
        )

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as numbers."""
        (k, v), shifts = super().read(), self.shifts
        return k + shifts[0].to(k.dtype), v + shifts[1].to(v.dtype)

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], constants: dict[str, Any]) -> ShiftedBody:
        """The body of these tensors and formats."""
        plain = CodedBody.restored(tensors, constants)
        shifts = (tensors["k.shift"], tensors["v.shift"])
        return cls(plain.k, plain.v, plain.index, plain.first, shifts=shifts)
