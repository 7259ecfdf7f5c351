"""Bodies: the part of a cache that is held in another form than one tensor of keys and values.

A cache layer is a list of bodies, which hold the context, and dense slots behind them, which hold the
newest tokens as they came. Attention over it is the merge of attention over each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.ops.segments import Segment
from attlas.storage.growing import Growing

#: Kind of a body -> its class, for reading stored caches.
KINDS: dict[str, type[Body]] = {}


class Body(ABC):
    """Keys and values of part of a context.

    Attributes:
        kind: the name under which it is stored.
        index: original positions of each slot, −1 for an empty one; None when slot i is column
            `first + i` in every row.
        first: column of slot 0 where there is no index.
        bias: what is added to the scores of a slot; None for nothing.
    """

    kind: ClassVar[str] = ""
    index: Int[Tensor, "batch kv_heads slots"] | None = None
    bias: Float[Tensor, "batch kv_heads slots"] | None = None
    first: int = 0

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if cls.kind:
            KINDS[cls.kind] = cls

    @property
    @abstractmethod
    def slots(self) -> int:
        """Slots of the longest head."""

    @abstractmethod
    def segment(self, index: Tensor | None = None, page: int = 1) -> Segment:
        """What `ops.decode` reads: everything, or the listed pages of slots.

        Raises:
            ValueError: this body cannot be read by a list.
        """

    @abstractmethod
    def read(self) -> tuple[Float[Tensor, "b h slots dim"], Float[Tensor, "b h slots v_dim"]]:
        """All keys and values as numbers; what an empty slot holds is not said."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name, batch first unless `rows` says otherwise."""

    @property
    def constants(self) -> dict[str, Any]:
        """Plain values that, with the tensors, make the body again."""
        return {"first": self.first}

    @classmethod
    @abstractmethod
    def restored(cls, tensors: dict[str, Tensor], constants: dict[str, Any]) -> Body:
        """The body of these tensors and constants."""

    def rows(self, change: Callable[[Tensor], Tensor]) -> Body:
        """The body with its rows in another order, some of them or repeated."""
        return self.restored({n: change(t) for n, t in self.tensors.items()}, self.constants)

    def reordered(self, rows: Int[Tensor, " batch"]) -> Body:
        """The body with its rows in another order, itself where they can stay where they lie."""
        return self.rows(lambda x: x.index_select(0, rows.to(x.device)))

    def fork(self) -> Body:
        """A body that may grow while this one stays."""
        return self.restored(self.tensors, self.constants)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(t.nbytes for t in self.tensors.values())

    def original_positions(self, batch: int, heads: int, device: torch.device) -> Tensor:
        """Original positions of every slot, [batch, kv_heads, slots]."""
        if self.index is not None:
            return self.index
        at = torch.arange(self.first, self.first + self.slots, dtype=torch.int32, device=device)
        return at.expand(batch, heads, -1)


class GrownBody(Body):
    """A body whose tensors grow along their tokens: rows of unequal length grow each at its own end.

    Args:
        held: tensors [batch, kv_heads, tokens or groups of them, width], by name.
        index: original positions, −1 behind the last of a shorter row; None for `first` and on.
        first: column of slot 0 where there is no index.
    """

    def __init__(
        self,
        held: dict[str, Tensor],
        index: Int[Tensor, "batch kv_heads slots"] | None,
        first: int,
    ) -> None:
        self.first = first
        self.held = {name: Growing(tensor) for name, tensor in held.items()}
        self.columns_held = None if index is None else Growing(index[..., None])
        self.lengths = filled(index)

    @property
    def index(self) -> Tensor | None:  # type: ignore[override]
        """Original positions of each slot, None when they follow one another in every row."""
        return None if self.columns_held is None else self.columns_held.tensor[..., 0]

    def group(self, name: str) -> int:
        """Tokens of one entry of a tensor; 0 for a tensor that does not grow."""
        return 1

    def alike(self, other: Body) -> bool:
        """Whether another body's tokens can be put behind these."""
        if type(other) is not type(self) or not self._follows(other):
            return False
        ends = torch.tensor(self.slots) if self.lengths is None else self.lengths
        groups = {self.group(name) or 1 for name in self.held}
        return all(bool((ends % group == 0).all()) for group in groups)

    def _follows(self, other: Body) -> bool:
        plain = self.columns_held is None and other.index is None
        return not plain or self.first + self.slots == other.first

    def append(self, other: GrownBody) -> None:
        """Put another body's tokens behind these, row by row; `alike` must have said that they can."""
        old, new = self.slots, other.slots
        if self.columns_held is None and other.columns_held is None:
            for name, growing in self.held.items():
                if self.group(name):
                    growing.append(other.held[name].tensor)
            return
        sample = next(iter(self.held.values())).tensor
        shape = (*sample.shape[:2], sample.device)
        if self.columns_held is None:
            self.columns_held = Growing(self.original_positions(*shape)[..., None].contiguous())
        at = torch.full(shape[:2], old, device=shape[2]) if self.lengths is None else self.lengths
        counts = torch.full_like(at, new) if other.lengths is None else other.lengths.to(at.dtype)
        for name, growing in self.held.items():
            if group := self.group(name):
                heads = growing.tensor.shape[1]  # one where all heads of a row share, alike in each
                growing.put(
                    other.held[name].tensor, at[:, :heads] // group, -(-counts[:, :heads] // group)
                )
        width = self.columns_held.tensor.shape[2]
        self.columns_held.put(other.original_positions(*shape)[..., None], at, counts)
        self.columns_held.tensor[:, :, width:][self.columns_held.tensor[:, :, width:] == 0] = -1
        self.lengths = (at + counts).to(torch.int32)

    def _growing(self) -> list[Growing]:
        columns = [] if self.columns_held is None else [self.columns_held]
        return [*self.held.values(), *columns]

    def fork(self) -> Body:
        """A body that may grow while this one stays, and looks at its memory."""
        for growing in self._growing():
            growing.show()
        return super().fork()

    def reordered(self, rows: Int[Tensor, " batch"]) -> Body:
        """Itself, with its rows in another order, where it holds nothing but what grows."""
        if type(self).rows is not Body.rows:
            return super().reordered(rows)
        for growing in self._growing():
            growing.reorder(rows)
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, rows.to(self.lengths.device))
        return self

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens, so that what is appended until then moves nothing."""
        for name, growing in self.held.items():
            group = self.group(name)
            growing.reserve(-(-tokens // group) if group else growing.count)

    def widened(self, lengths: Int[Tensor, "batch kv_heads"]) -> GrownBody:
        """The body with all its room, of which the first `lengths` slots are filled."""
        tensors = {
            name: growing.room if self.group(name) else growing.tensor
            for name, growing in self.held.items()
        }
        body: Any = self.restored(tensors, self.constants)
        body.lengths = lengths
        return body  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken, room to grow included."""
        index = 0 if self.columns_held is None else self.columns_held.nbytes
        return sum(held.nbytes for held in self.held.values()) + index

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is held, and the columns."""
        held = {name: growing.tensor for name, growing in self.held.items()}
        return held if self.index is None else {**held, "index": self.index}


def filled(index: Tensor | None) -> Int[Tensor, "batch kv_heads"] | None:
    """How many of the first slots are no holes, by row and head; None when all are."""
    return None if index is None else (index >= 0).sum(dim=-1, dtype=torch.int32)
