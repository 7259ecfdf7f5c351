"""Keys and values as they came, packed without padding: what a selection reads pages of."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from attlas.ops.segments import Dense, Listed
from attlas.storage.body import GrownBody


class PackedBody(GrownBody):
    """Keys and values in their own precision, each row's first token in slot 0.

    Args:
        k: keys.
        v: values.
        index: original columns, −1 behind the last of a shorter row; None for `first` and on.
        first: column of slot 0 where there is no index.
    """

    kind = "packed"

    def __init__(
        self,
        k: Float[Tensor, "batch kv_heads slots dim"],
        v: Float[Tensor, "batch kv_heads slots v_dim"],
        index: Int[Tensor, "batch kv_heads slots"] | None = None,
        first: int = 0,
    ) -> None:
        super().__init__({"k": k, "v": v}, index, first)

    @property
    def slots(self) -> int:
        """Tokens of the longest row."""
        return self.held["k"].tensor.shape[2]

    def segment(self, index: Tensor | None = None, page: int = 1) -> Dense | Listed:
        """All slots, or the listed pages."""
        k, v = self.read()
        if index is None:
            return Dense(k, v, self.lengths)
        return Listed(k, v, index, page, self.lengths)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.held["k"].tensor, self.held["v"].tensor

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], constants: dict[str, Any]) -> PackedBody:
        """The body of these tensors."""
        return cls(tensors["k"], tensors["v"], tensors.get("index"), constants["first"])
