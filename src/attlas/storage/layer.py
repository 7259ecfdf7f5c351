"""A cache layer that may hold fewer tokens than it has seen, and hold them in any form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attlas import ops
from attlas.errors import UserError
from attlas.ops.segments import Dense, Segment
from attlas.storage.body import Body, GrownBody, filled
from attlas.storage.growing import Growing
from attlas.storage.rotary import Rotary
from attlas.storage.rows import Rows

#: A slot's original column is kept as int32 beside its key and value.
INDEX_BYTES = 4


@dataclass
class LayerState:
    """What a part knows of one layer of one cache.

    Attributes:
        layer: index of the layer.
        full: the model's full-attention layers.
        windows: lengths of the model's sliding-window layers.
        rotary: how the model rotates, None when the part does not ask or it does not rotate.
        scaling: factor of q·k, known after the first call.
        tensors: what was gathered from the calls, batch first. It is held with the cache: what is not
            needed once the prompt is over is taken out when the part settles.
    """

    layer: int
    full: tuple[int, ...]
    windows: tuple[int, ...] = ()
    rotary: Rotary | None = None
    scaling: float = 1.0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def fork(self) -> LayerState:
        """A copy that shares the tensors, which are never written to."""
        return LayerState(
            self.layer, self.full, self.windows, self.rotary, self.scaling, dict(self.tensors)
        )


@dataclass(frozen=True)
class Chosen:
    """What a selection reads of a layer in one step.

    Attributes:
        index: numbers of pages, −1 for none; by key head, or by query head.
        page: slots of a page.
        slots: it chose among so many, those of the layer's first body; all others are read too.
        scored: bytes that were read in order to choose.
    """

    index: Int[Tensor, "batch list_heads pages"]
    page: int
    slots: int
    scored: int = 0


class StoredLayer(DynamicLayer):  # type: ignore[misc]
    """Bodies that hold a context in forms of their own, and dense slots behind them.

    `get_seq_length` and `get_mask_sizes` speak of the tokens seen, so that Transformers counts
    positions and builds masks in original coordinates; attlas's attention function takes of a mask
    the columns that the slots hold. Slots are numbered through: the bodies' first.

    Attributes:
        bodies: encoded parts of the context, by name.
        index: int32 [batch, kv_heads, n], original columns of the first n dense slots, −1 for an empty
            one; None while none was dropped. Dense slots behind them hold the last tokens in order.
        seen: tokens seen, padding included.
        ragged: some row has empty dense slots.
        fixed: tokens seen when some were last dropped, behind which the cache can be cropped.
        settled: the prompt is over and what parts do with it has been done.
        learned: what each part knows of this layer, by the part's name.
        attached: the forward call under way goes through attlas's attention.
        read_bytes: bytes of the cache that the last step read.
    """

    def __init__(self, learned: dict[str, LayerState] | None = None) -> None:
        self._keys: Growing | None = None
        self._values: Growing | None = None
        super().__init__()
        self.learned = {} if learned is None else learned
        self.bodies: dict[str, Body] = {}
        self.index: Tensor | None = None
        self.seen = 0
        self.fixed = 0
        self.ragged = False
        self.settled = False
        self.attached = False
        self.read_bytes = 0

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

    @property
    def dense_slots(self) -> int:
        """How many slots hold keys and values as they came."""
        return 0 if self._keys is None else self._keys.tensor.shape[2]

    @property
    def context_slots(self) -> int:
        """Slots of the bodies, which come before the dense ones."""
        return sum(body.slots for body in self.bodies.values())

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, slot indices and what parts remember."""
        growing = [held.nbytes for held in (self._keys, self._values) if held is not None]
        tensors = [t for state in self.learned.values() for t in state.tensors.values()]
        tensors += [] if self.index is None else [self.index]
        bodies = [body.nbytes for body in self.bodies.values()]
        return sum(growing) + sum(t.nbytes for t in tensors) + sum(bodies)

    # Transformers' cache interface.

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens; gives all keys and values, or where bodies hold some the appended alone.

        Raises:
            ValueError: bodies hold some, and the model is not attached.
        """
        self.seen += key_states.shape[-2]
        if self._keys is None or self._values is None:
            self.dtype, self.device, self.is_initialized = (
                key_states.dtype, key_states.device, True,
            )  # fmt: skip
            self.keys, self.values = key_states, value_states
        else:
            beside = self.context_slots
            self._keys.append(key_states, beside)
            self._values.append(value_states, beside)
        if not self.bodies:
            keys, values = self.keys, self.values
            assert keys is not None
            assert values is not None
            return keys, values
        if not self.attached:
            raise UserError(
                f"this cache holds its keys as {', '.join(self.bodies)}, which the model alone "
                "cannot read; go on inside attach(model, ...)"
            )
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, not held."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask: the whole sequence, in original columns."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything; the next call is a new prompt."""
        super().reset()
        self.bodies, self.index, self.seen, self.fixed = {}, None, 0, 0
        self.ragged, self.settled, self.read_bytes = False, False, 0
        for state in self.learned.values():
            state.tensors.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative number), of those that came after the prompt.

        Raises:
            ValueError: so many that what was dropped or encoded would be touched.
        """
        if tokens_to_remove >= 0 or self._keys is None:
            super().crop(tokens_to_remove)
            return
        limit = self.seen + tokens_to_remove
        batch, heads = self._keys.tensor.shape[:2]
        encoded = [int(b.columns(batch, heads, self.device).max()) for b in self.bodies.values()]
        free = self.seen - max([self.fixed, *(column + 1 for column in encoded)])
        if -tokens_to_remove > free:
            raise UserError(
                f"crop({tokens_to_remove}) reaches into the compressed context; only the last "
                f"{free} tokens can be taken back"
            )
        chosen = 0 if self.index is None else self.index.shape[-1]
        if -tokens_to_remove <= self.dense_slots - chosen:
            super().crop(tokens_to_remove)
        else:
            columns = self.dense_columns()
            self.keep(*first_ones((columns >= 0) & (columns < limit)))
        self.seen = limit

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, as beam search asks."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows."""
        self._rows(lambda x: x[indices.to(x.device)])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.changed(change), self._values.changed(change)
        if self.index is not None:
            self.index = change(self.index)
        self.bodies = {name: body.rows(change) for name, body in self.bodies.items()}
        for state in self.learned.values():
            state.tensors = {name: change(x) for name, x in state.tensors.items()}

    def fork(self) -> StoredLayer:
        """A layer that shares the memory, and leaves this one as it is whatever comes."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._keys, other._values = (h and h.fork() for h in (self._keys, self._values))
        other.bodies = {name: body.fork() for name, body in self.bodies.items()}
        other.learned = {name: state.fork() for name, state in self.learned.items()}
        return other

    # What parts do with it.

    def columns(self) -> Int[Tensor, "batch kv_heads slots"] | None:
        """Original column of every slot, None while slot and column are the same."""
        if self.index is None and not self.bodies:
            return None
        assert self._keys is not None
        batch, heads = self._keys.tensor.shape[:2]
        found = [body.columns(batch, heads, self.device) for body in self.bodies.values()]
        return torch.cat([*found, self.dense_columns()], dim=-1)

    def dense_columns(self) -> Int[Tensor, "batch kv_heads slots"]:
        """Original column of every dense slot."""
        assert self._keys is not None
        batch, heads = self._keys.tensor.shape[:2]
        chosen = 0 if self.index is None else self.index.shape[-1]
        first = self.seen - (self.dense_slots - chosen)
        tail = torch.arange(first, self.seen, dtype=torch.int32, device=self.device)
        tail = tail.expand(batch, heads, -1)
        return tail if self.index is None else torch.cat([self.index, tail], dim=-1)

    def keep(
        self, slots: Int[Tensor, "batch kv_heads n"], real: Bool[Tensor, "batch kv_heads n"]
    ) -> None:
        """Hold the given dense slots alone; where not `real` the slot is empty. Frees the rest."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        self.index = torch.where(real, self.dense_columns().gather(-1, slots), -1).to(torch.int32)
        self.ragged = not bool(real.all())
        self.keys, self.values = _at(keys, slots), _at(values, slots)

    def rows(self, real: Bool[Tensor, "batch told"] | None = None) -> Rows:
        """The rows of the tokens seen; `real` says which of them are no padding, None that all are."""
        return Rows(real, self.seen)

    def lengths(self, rows: Rows) -> list[int]:
        """Dense slots of each row that hold a token and no padding; as many in every head."""
        if self.index is None and rows.real is None:
            return [self.dense_slots] * (0 if self._keys is None else self._keys.tensor.shape[0])
        return self.there(rows)[:, 0].sum(dim=-1).tolist()

    def there(
        self, rows: Rows
    ) -> Bool[Tensor, "batch kv_heads slots"]:
        """Which dense slots hold a token that is no padding."""
        return rows.at(self.dense_columns())[0]

    def take(self, counts: list[int], rows: Rows) -> Taken:
        """The first tokens of each row, which lie in dense slots no more; padding is dropped.

        Args:
            counts: how many, by row; no more than `lengths`.
            rows: which of the tokens seen are real.
        """
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        there = None if self.index is None and rows.real is None else self.there(rows)
        if min(counts) == max(counts) and (there is None or (not self.ragged and there.all())):
            count = counts[0]
            first = self.seen - self.dense_slots
            index = None if self.index is None else self.dense_columns()[..., :count].contiguous()
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
        columns = self.dense_columns().gather(-1, order)
        goes = (number < wanted).expand_as(order)
        index = torch.where(goes, columns, -1)[..., : max(counts)]
        at = order[..., : max(counts)]
        taken = Taken(_at(keys, at), _at(values, at), index, 0)
        slots, stays = first_ones(there.gather(-1, order) & ~goes)
        self.keep(order.gather(-1, slots), stays)
        return taken

    def put(self, name: str, body: Body) -> None:
        """Hold a body, behind that of its name if there is one that it can follow, else beside it."""
        number = 0
        while (held := self.bodies.get(f"{name}{number or ''}")) is not None:
            if isinstance(held, GrownBody) and isinstance(body, GrownBody) and held.alike(body):
                held.append(body)
                return
            number += 1
        self.bodies[f"{name}{number or ''}"] = body

    def read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(keys, values, columns) of all slots, bodies turned to numbers. Takes the whole memory."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        if not self.bodies:
            return keys, values, self.columns()
        parts = [body.read() for body in self.bodies.values()]
        k = torch.cat([*(k.to(keys.dtype) for k, _ in parts), keys], dim=2)
        v = torch.cat([*(v.to(values.dtype) for _, v in parts), values], dim=2)
        return k, v, self.columns()

    def biases(self) -> Float[Tensor, "batch kv_heads seen"] | None:
        """What the bodies add to the scores of the token of each column; None for nothing."""
        found = [body for body in self.bodies.values() if body.bias is not None]
        if not found:
            return None
        batch, heads = self._keys.tensor.shape[:2]  # type: ignore[union-attr]
        table = torch.zeros(batch, heads, self.seen + 1, device=self.device)
        for body in found:
            columns = body.columns(batch, heads, self.device).long()
            # What is no slot goes where no column is.
            table.scatter_(2, torch.where(columns < 0, self.seen, columns), body.bias.to(table))  # type: ignore[union-attr]
        return table[..., : self.seen]

    def attend(
        self,
        q: Float[Tensor, "batch heads queries dim"],
        *,
        scale: float,
        visible: Bool[Tensor, "batch mask_heads queries seen"] | None = None,
        sinks: Tensor | None = None,
        chosen: Chosen | None = None,
    ) -> Float[Tensor, "batch heads queries v_dim"]:
        """Attention of this call's queries over all that is held, in the form in which it is held.

        Args:
            q: queries; the last stands at the last token.
            scale: of the products.
            visible: the model's mask in original columns; None for causal attention.
            sinks: logits that take part without a value.
            chosen: the slots to be read; None for all.
        """
        found = self.segments(q.shape[2], visible, chosen)
        self.read_bytes = sum(s.nbytes for s in found) + (chosen.scored if chosen else 0)
        return ops.decode(q, found, scale=scale, sinks=sinks)[0]

    def segments(
        self, queries: int, visible: Tensor | None = None, chosen: Chosen | None = None
    ) -> list[Segment]:
        """What `ops.decode` reads: the bodies, then the dense slots.

        Raises:
            ValueError: a choice among other slots than those of the first body.
        """
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        found: list[Segment] = []
        for number, body in enumerate(self.bodies.values()):
            if chosen is None or number:
                found.append(body.segment())
            elif chosen.slots == body.slots:
                found.append(body.segment(chosen.index, chosen.page))
            else:
                raise UserError(
                    f"a selection among {chosen.slots} slots cannot be read from {body.slots}"
                )
        start = 0
        if self.index is not None and (self.ragged or visible is not None):
            # What was kept is no padding and no later than any query, and its holes come last.
            start = self.index.shape[-1]
            lengths = filled(self.index) if self.ragged else None
            found.append(Dense(keys[:, :, :start], values[:, :, :start], lengths))
        if self.dense_slots > start:
            seen = None
            if visible is not None:
                seen = visible[..., self.seen - (self.dense_slots - start) : self.seen]
            k, v = keys[:, :, start:], values[:, :, start:]
            found.append(Dense(k, v, visible=seen, causal=visible is None))
        return found


def first_ones(
    there: Bool[Tensor, "batch kv_heads slots"],
) -> tuple[Int[Tensor, "batch kv_heads n"], Bool[Tensor, "batch kv_heads n"]]:
    """(slots that are there, in their order, then others; which of them are there), by row and head."""
    order = (~there).long().sort(dim=-1, stable=True).indices
    order = order[..., : int(there.sum(dim=-1).max())]
    return order, there.gather(-1, order)


def _at(x: Tensor, slots: Tensor) -> Tensor:
    return x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1]))


@dataclass(frozen=True)
class Taken:
    """Slots that `StoredLayer.take` gave away: what a body is made of."""

    k: Float[Tensor, "batch kv_heads slots dim"]
    v: Float[Tensor, "batch kv_heads slots v_dim"]
    index: Int[Tensor, "batch kv_heads slots"] | None
    first: int
