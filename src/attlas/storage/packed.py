"""Keys and values as they came, packed without padding: what a selection reads pages of."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from attlas.errors import UserError
from attlas.ops.segments import Dense, Listed
from attlas.storage.body import Body, GrownBody


class PackedBody(GrownBody):
    """Keys and values in their own precision, each row's first token in slot 0.

    Args:
        k: keys.
        v: values.
        index: original positions, −1 behind the last of a shorter row; None for `first` and on.
        first: column of slot 0 where there is no index.
        bias: added to a slot's scores: the logarithm of how many tokens it stands for.
    """

    kind = "packed"

    def __init__(
        self,
        k: Float[Tensor, "batch kv_heads slots dim"],
        v: Float[Tensor, "batch kv_heads slots v_dim"],
        index: Int[Tensor, "batch kv_heads slots"] | None = None,
        first: int = 0,
        bias: Float[Tensor, "batch kv_heads slots"] | None = None,
    ) -> None:
        held = {"k": k, "v": v} if bias is None else {"k": k, "v": v, "bias": bias[..., None]}
        super().__init__(held, index, first)

    @property
    def slots(self) -> int:
        """Tokens of the longest row."""
        return self.held["k"].tensor.shape[2]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """What is added to a slot's scores."""
        return self.held["bias"].tensor[..., 0] if "bias" in self.held else None

    def alike(self, other: Body) -> bool:
        """Whether both have biases or neither, and the other's tokens can follow."""
        return super().alike(other) and (self.bias is None) == (other.bias is None)

    def segment(self, index: Tensor | None = None, page: int = 1) -> Dense | Listed:
        """All slots, or the listed pages.

        Raises:
            ValueError: pages of slots that have biases.
        """
        k, v = self.read()
        if index is None:
            return Dense(k, v, self.lengths, bias=self.bias)
        if self.bias is not None:
            raise UserError("a selection cannot read pages of a cache whose keys have weights")
        return Listed(k, v, index, page, self.lengths)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.held["k"].tensor, self.held["v"].tensor

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], constants: dict[str, Any]) -> PackedBody:
        """The body of these tensors."""
        bias = tensors["bias"][..., 0] if "bias" in tensors else None
        return cls(tensors["k"], tensors["v"], tensors.get("index"), constants["first"], bias)
