"""How much of a cache a policy may keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from attlas.errors import UserError, exactly_one


@dataclass(frozen=True)
class Budget:
    """A promise about the size of a cache; exactly one of the three is set.

    Attributes:
        keep: share of the context's tokens, in (0, 1]; `int(tokens * keep)` stay.
        tokens: tokens kept on average over the layers.
        bytes: bytes of the whole cache: all layers, keys, values and slot indices.

    Raises:
        ValueError: none or several are given, or one lies outside its range.
    """

    keep: float | None = None
    tokens: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        exactly_one("a budget", keep=self.keep, tokens=self.tokens, bytes=self.bytes)
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UserError(f"keep must lie in (0, 1], got {self.keep}")
        for name in ("tokens", "bytes"):
            value = getattr(self, name)
            if value is not None and (int(value) != value or value < 1):
                raise UserError(f"{name} must be a whole number of at least 1, got {value}")

    def slots(
        self,
        total: Int[Tensor, " batch"],
        *,
        slot_bytes: int,
        index_bytes: int,
        layers: int,
        whole: int,
        windows: int,
    ) -> Int[Tensor, " batch"]:
        """Tokens that one compressed layer keeps, for each row.

        Layers that stay whole are paid for by the others: `layers * n` tokens are promised, and
        the `layers - whole` compressed ones share what the whole ones leave.

        Args:
            total: tokens of each row, padding not counted.
            slot_bytes: bytes of one token's key and value in one layer.
            index_bytes: bytes of its slot index, in a compressed layer.
            layers: full-attention layers of the cache.
            whole: how many of these are not compressed.
            windows: tokens that the model's sliding-window layers hold, all together.

        Raises:
            ValueError: the layers that stay whole use up the budget.
        """
        # Plain integers: a handful of rows, and int() of a product in double precision.
        counts: list[int] = total.tolist()
        kept = []
        for count in counts:
            if self.bytes is not None:
                left = self.bytes // len(counts) - slot_bytes * (windows + whole * count)
                room = left // ((slot_bytes + index_bytes) * (layers - whole))
            else:
                promised = int(count * self.keep) if self.keep is not None else self.tokens or 0
                room = (layers * promised - whole * count) // (layers - whole)
            if room < 1 < count:
                raise UserError(
                    f"the budget {self} leaves no token for a context of {count} tokens"
                    + (f" beside {whole} layers kept whole" if whole else "")
                    + "; give a larger budget"
                )
            kept.append(max(1, min(room, count)))
        return torch.tensor(kept, device=total.device)

    def __str__(self) -> str:
        name = next(n for n in ("keep", "tokens", "bytes") if getattr(self, n) is not None)
        return f"{name}={getattr(self, name)}"
