"""Dense slots: keys and values as they came, of which some tokens may have been dropped."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attlas.hf.caches import DynamicLayer
from attlas.storage.growing import Growing
from attlas.storage.rows import Rows
from attlas.storage.state import Taken

#: A slot's original positions is kept as int32 beside its key and value.
INDEX_BYTES = 4


class DenseSlots(DynamicLayer):  # type: ignore[misc]
    """Slots that each hold a key and a value, and the original positions of each.

    Attributes:
        index: int32 [batch, kv_heads, n], original positions of the first n slots, −1 for an empty one;
            None while none was dropped. Slots behind them hold the last tokens in order.
        seen: tokens seen, padding included.
        ragged: some row has empty slots.
    """

    def __init__(self) -> None:
        self._keys: Growing | None = None
        self._values: Growing | None = None
        super().__init__()
        self.index: Tensor | None = None
        self.seen = 0
        self.ragged = False

    # Keys and values grow in place; whoever sets them gives a whole.

    @property
    def keys(self) -> Tensor | None:
        """Keys of the dense slots."""
        return None if self._keys is None else self._keys.tensor

    @keys.setter
    def keys(self, given: Tensor | None) -> None:
        self._keys = None if given is None else Growing(given)

    @property
    def values(self) -> Tensor | None:
        """Values of the dense slots."""
        return None if self._values is None else self._values.tensor

    @values.setter
    def values(self, given: Tensor | None) -> None:
        self._values = None if given is None else Growing(given)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Transformers' call before the first tokens; there is nothing to set up."""
        self.device, self.is_initialized = key_states.device, True

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """These keys and values in place of any others."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def reset(self) -> None:
        """No slots, and no token seen."""
        # Before 5.18 Transformers overwrites keys and values, which forks may share, and keeps them.
        self.keys = self.values = self.index = None
        self.is_initialized, self.seen, self.ragged = False, 0, False
        super().reset()

    @property
    def dense_slots(self) -> int:
        """How many slots hold keys and values as they came."""
        return 0 if self._keys is None else self._keys.count

    def dense_positions(self) -> Int[Tensor, "batch kv_heads slots"]:
        """Original positions of every dense slot."""
        assert self._keys is not None
        batch, heads = self._keys.tensor.shape[:2]
        chosen = 0 if self.index is None else self.index.shape[-1]
        first = self.seen - (self.dense_slots - chosen)
        tail = torch.arange(first, self.seen, dtype=torch.int32, device=self.device)
        tail = tail.expand(batch, heads, -1)
        return tail if self.index is None else torch.cat([self.index, tail], dim=-1)

    def keep(
        self, slots: Int[Tensor, "batch kv_heads n"], valid: Bool[Tensor, "batch kv_heads n"]
    ) -> None:
        """Hold the given dense slots alone; where not `valid` the slot is empty. Frees the rest."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        self.index = torch.where(valid, self.dense_positions().gather(-1, slots), -1).to(
            torch.int32
        )
        self.ragged = not bool(valid.all())
        self.keys, self.values = _at(keys, slots), _at(values, slots)

    def rows(self, valid: Bool[Tensor, "batch told"] | None = None) -> Rows:
        """The rows of the tokens seen; `valid` says which of them are no padding, None that all are."""
        return Rows(valid, self.seen)

    def lengths(self, rows: Rows) -> list[int]:
        """Dense slots of each row that hold a token and no padding; as many in every head."""
        if self.index is None and rows.valid is None:
            return [self.dense_slots] * (0 if self._keys is None else self._keys.tensor.shape[0])
        return self.there(rows)[:, 0].sum(dim=-1).tolist()

    def there(self, rows: Rows) -> Bool[Tensor, "batch kv_heads slots"]:
        """Which dense slots hold a token that is no padding."""
        return rows.at(self.dense_positions())[0]

    def take(self, counts: list[int], rows: Rows) -> Taken:
        """The first tokens of each row, which lie in dense slots no more; padding is dropped.

        Args:
            counts: how many, by row; no more than `lengths`.
            rows: which of the tokens seen are valid.
        """
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        there = None if self.index is None and rows.valid is None else self.there(rows)
        if min(counts) == max(counts) and (there is None or (not self.ragged and there.all())):
            count = counts[0]
            first = self.seen - self.dense_slots
            index = None if self.index is None else self.dense_positions()[..., :count].contiguous()
            taken = Taken(keys[:, :, :count], values[:, :, :count], index, first)
            # Copies, so that what was taken frees the memory that it lay in.
            self.keys, self.values = keys[:, :, count:].clone(), values[:, :, count:].clone()
            rest = None if self.index is None else self.index[..., count:]
            self.index = None if rest is None or not rest.shape[-1] else rest
            return taken
        there = self.there(rows)
        order = (~there).long().sort(dim=-1, stable=True).indices
        number = torch.arange(order.shape[-1], device=order.device)
        wanted = torch.tensor(counts, device=order.device)[:, None, None]
        columns = self.dense_positions().gather(-1, order)
        goes = (number < wanted).expand_as(order)
        index = torch.where(goes, columns, -1)[..., : max(counts)]
        at = order[..., : max(counts)]
        taken = Taken(_at(keys, at), _at(values, at), index, 0)
        slots, stays = first_ones(there.gather(-1, order) & ~goes)
        self.keep(order.gather(-1, slots), stays)
        return taken


def first_ones(
    there: Bool[Tensor, "batch kv_heads slots"],
) -> tuple[Int[Tensor, "batch kv_heads n"], Bool[Tensor, "batch kv_heads n"]]:
    """(slots that are there, in their order, then others; which of them are there), by row and head."""
    order = (~there).long().sort(dim=-1, stable=True).indices
    order = order[..., : int(there.sum(dim=-1).max())]
    return order, there.gather(-1, order)


def _at(x: Tensor, slots: Tensor) -> Tensor:
    return x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1]))
