"""A different number of keys for each head: one flat buffer, an offset and a length for each head.

Bytes follow the sum of the lengths, not the longest: what a head drops is freed, not hidden. Rows in
another order share the buffer, since offsets alone say what belongs to whom.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas.errors import UserError
from attlas.ops.segments import Ragged
from attlas.storage.body import Body


class RaggedBody(Body):
    """Keys and values of heads with budgets of their own.

    Args:
        k: keys of all rows and heads, one head behind the other.
        v: values likewise.
        column: original positions of each.
        offsets: where each head starts.
        lengths: how many slots it has.
    """

    kind = "ragged"

    def __init__(
        self,
        k: Float[Tensor, "slots dim"],
        v: Float[Tensor, "slots v_dim"],
        column: Int[Tensor, " slots"],
        offsets: Int[Tensor, "batch kv_heads"],
        lengths: Int[Tensor, "batch kv_heads"],
    ) -> None:
        self.k, self.v, self.column, self.offsets, self.lengths = k, v, column, offsets, lengths
        self.longest = int(lengths.max()) if lengths.numel() else 0

    @classmethod
    def kept(
        cls,
        keys: Float[Tensor, "batch kv_heads slots dim"],
        values: Float[Tensor, "batch kv_heads slots v_dim"],
        columns: Int[Tensor, "batch kv_heads slots"],
        keep: Bool[Tensor, "batch kv_heads slots"],
    ) -> RaggedBody:
        """The slots that `keep` marks, in their order."""
        lengths = keep.sum(dim=-1)
        offsets = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)
        return cls(
            keys[keep], values[keep], columns[keep].to(torch.int32), offsets,
            lengths.to(torch.int32),
        )  # fmt: skip

    @property
    def slots(self) -> int:
        """Slots of the longest head."""
        return self.longest

    def segment(self, index: Tensor | None = None, page: int = 1) -> Ragged:
        """The whole buffer."""
        if index is not None:
            raise UserError(
                "a selection takes a cache whose heads hold equally many keys; budgets per head "
                "leave no common pages"
            )
        return Ragged(self.k, self.v, self.offsets, self.lengths, self.longest)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values padded to the longest head."""
        at = self._at()
        return self.k[at], self.v[at]

    def original_positions(self, batch: int, heads: int, device: torch.device) -> Tensor:
        """Original positions padded with −1 to the longest head."""
        slot = torch.arange(self.longest, device=self.k.device)
        return torch.where(slot < self.lengths[..., None], self.column[self._at()], -1)

    def _at(self) -> Tensor:
        slot = torch.arange(self.longest, device=self.k.device)
        return (self.offsets[..., None] + slot).clamp(max=max(0, len(self.k) - 1))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Buffer, columns, offsets and lengths."""
        names = ("k", "v", "column", "offsets", "lengths")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], constants: dict[str, Any]) -> RaggedBody:
        """The body of these tensors."""
        return cls(**tensors)

    def rows(self, change: Callable[[Tensor], Tensor]) -> RaggedBody:
        """Offsets and lengths of other rows over the same buffer."""
        return RaggedBody(self.k, self.v, self.column, change(self.offsets), change(self.lengths))
