"""A cache layer that may hold fewer tokens than it has seen, and hold them in any form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas import ops
from attlas.errors import UserError
from attlas.hf.caches import DynamicLayer
from attlas.ops.segments import Dense, Segment
from attlas.storage.body import Body, GrownBody, filled
from attlas.storage.slots import INDEX_BYTES, DenseSlots, first_ones
from attlas.storage.state import Chosen, LayerState, Taken

__all__ = ["INDEX_BYTES", "Chosen", "LayerState", "StoredLayer", "Taken", "first_ones"]


class StoredLayer(DenseSlots):
    """The stateful cache layer: bodies in forms of their own, dense slots behind them, named tensors.

    `get_seq_length` and `get_mask_sizes` speak of the tokens seen, so that Transformers counts
    positions and builds masks in original coordinates; attlas's attention function takes of a mask
    the columns that the slots hold. Slots are numbered through: the bodies' first. A mechanism that
    remembers more than keys and values, or other things in their place, keeps them in `states`.

    Attributes:
        bodies: encoded parts of the context, by name.
        states: what a mechanism remembers, by name; the first axis is the batch.
        fixed: tokens seen when some were last dropped, behind which the cache can be cropped.
        settled: the prompt is over and what parts do with it has been done.
        learned: what each part knows of this layer, by the part's name.
        attached: the forward call under way goes through attlas's attention.
        read_bytes: bytes of the cache that the last step read.
        seated: a captured step writes to the states in place, so that a fork has to copy them.
        promised: tokens that are known to come in all, for which room is made at once.
    """

    def __init__(self, learned: dict[str, LayerState] | None = None) -> None:
        super().__init__()
        self.learned = {} if learned is None else learned
        self.bodies: dict[str, Body] = {}
        self.states: dict[str, Tensor] = {}
        self.fixed = 0
        self.compressed = False
        self.attached = False
        self.read_bytes = 0
        self.seated = False
        self.promised = 0

    @property
    def context_slots(self) -> int:
        """Slots of the bodies, which come before the dense ones."""
        return sum(body.slots for body in self.bodies.values())

    @property
    def managed(self) -> bool:
        """Whether parts have a hand in it, so that the model has to read it through attlas."""
        return bool(self.learned or self.bodies or self.index is not None)

    @property
    def latent(self) -> bool:
        """Whether the model makes keys and values of what is held, whatever form that has."""
        return any(state.latent for state in self.learned.values())

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: what a recurrence has taken in cannot."""
        return not self.states and (self._keys is not None or not self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, slot indices and what mechanism and parts remember."""
        growing = [held.nbytes for held in (self._keys, self._values) if held is not None]
        tensors = [t for state in self.learned.values() for t in state.tensors.values()]
        tensors += [*self.states.values(), *([] if self.index is None else [self.index])]
        bodies = [body.nbytes for body in self.bodies.values()]
        return sum(growing) + sum(t.nbytes for t in tensors) + sum(bodies)

    # Transformers' cache interface.

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens; gives all keys and values, or where bodies hold some the appended alone.

        Latents, of which the model makes keys, are given as numbers, all of them.

        Raises:
            ValueError: bodies hold some, and the model is not attached.
        """
        self.seen += key_states.shape[-2]
        if self._keys is None or self._values is None:
            self.hold(key_states, value_states)
        else:
            beside, coming = self.context_slots, max(0, self.promised - self.seen)
            self._keys.append(key_states, beside, coming)
            self._values.append(value_states, beside, coming)
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
        if self.latent:
            return self.read()[:2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, not held."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask: the whole sequence, in original positions."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything; the next call is a new prompt."""
        super().reset()
        self.bodies, self.states = {}, {}
        self.fixed, self.compressed, self.read_bytes, self.promised = 0, False, 0, 0
        for state in self.learned.values():
            state.tensors.clear()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the last tokens (a negative number), of those that came after the prompt.

        Raises:
            ValueError: a positive number, so many that what was dropped or encoded would be touched,
                or a layer whose mechanism remembers more than keys and values.
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding of 5.17 gives a tensor
        if tokens_to_remove > 0 or (tokens_to_remove and not self.is_croppable):
            most = "a negative number" if self.is_croppable else "0 here"
            raise UserError(f"tokens_to_remove must be {most}, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self._keys is None:
            return
        limit = self.seen + tokens_to_remove
        batch, heads = self._keys.tensor.shape[:2]
        encoded = [
            int(b.original_positions(batch, heads, self.device).max()) for b in self.bodies.values()
        ]
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
            columns = self.dense_positions()
            self.keep(*first_ones((columns >= 0) & (columns < limit)))
        self.seen = limit

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, as beam search asks; keys and values stay where they lie."""
        if self._keys is not None and self._values is not None:
            self._keys.reorder(beam_idx)
            self._values.reorder(beam_idx)
        self.bodies = {name: body.reordered(beam_idx) for name, body in self.bodies.items()}
        for name, held in self.states.items():
            moved = held.index_select(0, beam_idx.to(held.device))
            self.states[name] = held.copy_(moved) if self.seated else moved
        self._change_told(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        self._changed(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows."""
        self._changed(lambda x: x[indices.to(x.device)])

    def _changed(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys.changed(change), self._values.changed(change)
        self.bodies = {name: body.rows(change) for name, body in self.bodies.items()}
        self.states = {name: change(x) for name, x in self.states.items()}
        self._change_told(change)

    def _change_told(self, change: Callable[[Tensor], Tensor]) -> None:
        """The rows of what tells of slots and of what parts know."""
        if self.index is not None:
            self.index = change(self.index)
        for state in self.learned.values():
            state.tensors = {name: change(x) for name, x in state.tensors.items()}

    def fork(self) -> StoredLayer:
        """A layer that shares the memory, and leaves this one as it is whatever comes."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._keys, other._values = (h and h.fork() for h in (self._keys, self._values))
        other.bodies = {name: body.fork() for name, body in self.bodies.items()}
        other.states = {n: x.clone() if self.seated else x for n, x in self.states.items()}
        other.learned = {name: state.fork() for name, state in self.learned.items()}
        return other

    def take_over(self, layer: DynamicLayer) -> None:
        """Hold what a plain layer holds, sharing its tensors."""
        if layer.get_seq_length():
            self.hold(layer.keys, layer.values)
            self.seen = layer.get_seq_length()

    # What parts do with it.

    def original_positions(self) -> Int[Tensor, "batch kv_heads slots"] | None:
        """Original positions of every slot, None while slot and column are the same."""
        if self.index is None and not self.bodies:
            return None
        assert self._keys is not None
        batch, heads = self._keys.tensor.shape[:2]
        found = [
            body.original_positions(batch, heads, self.device) for body in self.bodies.values()
        ]
        return torch.cat([*found, self.dense_positions()], dim=-1)

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
            return keys, values, self.original_positions()
        parts = [body.read() for body in self.bodies.values()]
        k = torch.cat([*(k.to(keys.dtype) for k, _ in parts), keys], dim=2)
        v = torch.cat([*(v.to(values.dtype) for _, v in parts), values], dim=2)
        return k, v, self.original_positions()

    def biases(self) -> Float[Tensor, "batch kv_heads seen"] | None:
        """What the bodies add to the scores of the token of each column; None for nothing."""
        found = [body for body in self.bodies.values() if body.bias is not None]
        if not found:
            return None
        batch, heads = self._keys.tensor.shape[:2]  # type: ignore[union-attr]
        table = torch.zeros(batch, heads, self.seen + 1, device=self.device)
        for body in found:
            columns = body.original_positions(batch, heads, self.device).long()
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
            visible: the model's mask in original positions; None for causal attention.
            sinks: logits that take part without a value.
            chosen: the slots to be read; None for all.
        """
        found = self.segments(visible, chosen)
        self.read_bytes = sum(s.nbytes for s in found) + (chosen.scored if chosen else 0)
        return ops.decode(q, found, scale=scale, sinks=sinks)[0]

    def segments(
        self, visible: Tensor | None = None, chosen: Chosen | None = None
    ) -> list[Segment]:
        """What `ops.decode` reads: the bodies, then the dense slots.

        Raises:
            ValueError: a choice among other slots than those of the first body.
        """
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
        return [*found, *self._dense_segments(visible)]

    def _dense_segments(self, visible: Tensor | None) -> list[Segment]:
        """The dense slots: those that were kept of more, and the newest."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        found: list[Segment] = []
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
