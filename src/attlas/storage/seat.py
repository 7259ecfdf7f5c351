"""Seats: a layer whose tensors stay where they are, so that a captured step may write and read them.

A CUDA graph runs what it recorded over the same addresses, whatever numbers Python had then. So the keys
and values of a layer are given room to grow in place, and the recorded step works on a twin of the layer:
it sees all of the room, and reads from the device how much of it is filled. The layer itself counts on.
"""

from __future__ import annotations

from dataclasses import replace
from operator import is_

import torch
from torch import Tensor

from attlas.errors import UserError
from attlas.storage.body import Body, GrownBody
from attlas.storage.coded import CodedBody
from attlas.storage.growing import Growing
from attlas.storage.layer import StoredLayer
from attlas.storage.packed import PackedBody
from attlas.storage.tiered import TieredBody
from attlas.storage.twin import MemorySeat, Twin

#: Room for tokens to come: a share of those held, at least so many, at most so many.
SHARE, LEAST, MOST = 16, 128, 8192
#: Bodies that grow while tokens are decoded, and can be read with their lengths on the device.
GROWING = (PackedBody, CodedBody)
#: Room is a whole number of these, so that groups of codes and pages fill it.
WHOLE = 256


class Seat:
    """A layer in its place, and its twin.

    Args:
        layer: that is held; its tensors are moved where there is room.
        slot: of the twin.
        lengths: of the twin, [batch, kv_heads].
        padded: some tokens are padding.
        latents: the model makes keys of what the layer holds.

    Raises:
        ValueError: the layer holds something that a recorded step cannot read.
    """

    def __init__(
        self, layer: StoredLayer, slot: Tensor, lengths: Tensor, padded: bool, latents: bool
    ) -> None:
        self.layer, self.slot, self.lengths, self.latents = layer, slot, lengths, latents
        keys, values = _checked(layer, latents)
        for held in (keys, values):
            held.reserve(_whole(layer.dense_slots + _spare(layer)))
        self.visible: Tensor | None = None
        if padded or layer.ragged:
            shape = (*lengths.shape, 1, keys.room.shape[2])
            self.visible = torch.ones(shape, dtype=torch.bool, device=lengths.device)
        self.bodies: dict[str, tuple[Body, Tensor | None]] = {}
        for name, body in layer.bodies.items():
            grows = type(body) in GROWING
            if grows and isinstance(body, GrownBody):
                body.reserve(_whole(body.slots + _spare(layer)))
            filled_slots = torch.zeros_like(lengths) if grows else None
            self.bodies[name] = body, filled_slots
        self._rooms = {path: held.room for path, held in self._held().items()}
        self._states = [
            (state, {name: _roomy(t, self) for name, t in state.tensors.items() if name in state.growing})
            for state in layer.learned.values()
        ]  # fmt: skip
        self._fixed = [
            {name: t for name, t in state.tensors.items() if name not in (*rooms, *state.counted)}
            for state, rooms in self._states
        ]
        self._memory = MemorySeat(layer)
        self.twin = self._twin()
        self._memory.twin = self.twin
        self._token = keys.tensor[:, :, :1].nbytes + values.tensor[:, :, :1].nbytes
        self._told: tuple[int, ...] = ()
        self._told_tensors: list[Tensor | None] = []
        self._bodies_read: int | None = None
        self.settle()

    # Before and after a step.

    @property
    def ready(self) -> bool:
        """Whether all lies where the recorded step looks for it, and there is room for a token."""
        layer = self.layer
        if not self._memory.ready or (layer.ragged and self.visible is None):
            return False
        if layer.dense_slots >= self._rooms["keys"].shape[2]:
            return False
        bodies = [body for body, _ in self.bodies.values()]
        if len(bodies) != len(layer.bodies) or any(
            body is not held for body, held in zip(bodies, layer.bodies.values(), strict=True)
        ):
            return False
        for (state, rooms), fixed in zip(self._states, self._fixed, strict=True):
            left = (*rooms, *state.counted)
            there = {name: t for name, t in state.tensors.items() if name not in left}
            if there.keys() != fixed.keys() or any(there[n] is not t for n, t in fixed.items()):
                return False
            if any(state.tensors[n].data_ptr() != room.data_ptr() for n, room in rooms.items()):
                return False
        return self._still

    @property
    def _still(self) -> bool:
        """Whether keys, values and codes lie in their rooms, at which no fork looks."""
        return all(
            held.owned and held.room is self._rooms[path] for path, held in self._held().items()
        )

    def put_back(self) -> None:
        """What was moved, as beams are, goes back where the step reads it, unless a fork looks there."""
        if self._still:
            self.settle()

    def tell(self, valid: Tensor | None, anew: bool) -> None:
        """Write to the device what Python counts.

        Args:
            valid: which tokens are no padding, that which comes included; None when all are.
            anew: of earlier tokens it says something else than before.
        """
        counts = self._counts()
        tensors = [body.lengths for body, _ in self.bodies.values() if isinstance(body, GrownBody)]
        tensors.append(self.layer.index)
        if anew or counts != self._told or not all(map(is_, tensors, self._told_tensors)):
            self._told, self._told_tensors = counts, tensors
            self.slot.fill_(self.layer.dense_slots)
            self.lengths.fill_(self.layer.dense_slots)
            for body, there in self.bodies.values():
                if there is not None and isinstance(body, GrownBody):
                    _ = there.fill_(body.slots) if body.lengths is None else there.copy_(body.lengths)
            self._bodies_read = None
            self._show(valid)
        elif valid is not None and self.visible is not None:
            self.visible[:, :, 0, self.layer.dense_slots] = valid[:, -1:]

    def _show(self, valid: Tensor | None) -> None:
        """Which dense slots hold a token that is no padding, and whether the one that comes will."""
        if self.visible is None:
            return
        layer, kept, slots = self.layer, self.layer.index, self.layer.dense_slots
        start = 0 if kept is None else kept.shape[-1]
        if kept is not None:
            self.visible[:, :, 0, :start] = kept >= 0
        newest = True if valid is None else valid[:, None, layer.seen - (slots - start) : layer.seen + 1]
        self.visible[:, :, 0, start : slots + 1] = newest

    def advance(self) -> None:
        """The recorded step has run: a token more is held."""
        layer = self.layer
        assert layer._keys is not None
        assert layer._values is not None
        layer._keys.advance()
        layer._values.advance()
        self._memory.advance()
        self._told = (layer.dense_slots, *self._told[1:])
        if self._bodies_read is None:
            self._bodies_read = self._read_of_bodies()
        layer.read_bytes = self._bodies_read + layer.dense_slots * self._token

    def keep(self) -> None:
        """At the end of the step: its states, where they lie."""
        self._memory.keep()

    def undo(self) -> None:
        """States as they were; keys that a step which failed has written are not counted."""
        self._memory.undo()

    def settle(self) -> None:
        """Move back what a part has put elsewhere; where there is no room for it `ready` says so."""
        for path, held in self._held().items():
            room = self._rooms.get(path)
            if room is None or held.room is room:
                continue
            if held.room.shape[:2] == room.shape[:2] and held.count <= room.shape[2]:
                held.move(room)
        for state, rooms in self._states:
            for name, room in rooms.items():
                now = state.tensors[name]
                if now.data_ptr() != room.data_ptr() and now.shape[2] <= room.shape[2]:
                    room[:, :, : now.shape[2]] = now
                    state.tensors[name] = room[:, :, : now.shape[2]]

    # What it is made of.

    def _held(self) -> dict[str, Growing]:
        layer = self.layer
        assert layer._keys is not None
        assert layer._values is not None
        found = {"keys": layer._keys, "values": layer._values}
        for name, body in layer.bodies.items():
            if type(body) in GROWING and isinstance(body, GrownBody):
                found |= {f"{name}.{n}": held for n, held in body.held.items()}
        return found

    def _read_of_bodies(self) -> int:
        """Bytes that a step reads of what is not the newest: of room, the share that is filled."""
        found = 0
        shares = []
        for (body, there), twin in zip(self.bodies.values(), self.twin.bodies.values(), strict=True):
            shares.append(1.0 if there is None else body.slots / max(1, twin.slots))
        for segment, share in zip(self.twin.told, shares, strict=False):
            found += round(segment.nbytes * share)
        return found + round(self.twin.scored * (shares[0] if shares else 1.0))

    def _counts(self) -> tuple[int, ...]:
        bodies = (body.slots for body, there in self.bodies.values() if there is not None)
        return (self.layer.dense_slots, *bodies)

    def _twin(self) -> Twin:
        layer, twin = self.layer, object.__new__(Twin)
        twin.__dict__.update(layer.__dict__)
        twin.compressed = twin.attached = True
        twin.states = dict(layer.states)
        twin.moved = layer.index is not None
        twin.index, twin.slot, twin.count = None, self.slot, self.lengths
        twin._keys, twin._values = (Growing(self._rooms[name]) for name in ("keys", "values"))
        twin.visible, twin.latent = self.visible, self.latents
        twin.bodies = {
            name: body if there is None or not isinstance(body, GrownBody) else body.widened(there)
            for name, (body, there) in self.bodies.items()
        }
        twin.learned = {
            name: replace(state, tensors={**state.tensors, **rooms})
            for (name, state), (_, rooms) in zip(layer.learned.items(), self._states, strict=True)
        }
        return twin


def _spare(layer: StoredLayer) -> int:
    return min(MOST, max(LEAST, layer.seen // SHARE))


def _checked(layer: StoredLayer, latents: bool) -> tuple[Growing, Growing]:
    if latents and layer.bodies:
        raise UserError("a layer holds encoded latents, of which the model makes keys")
    if any(isinstance(body, TieredBody) for body in layer.bodies.values()):
        raise UserError("a part holds keys in host memory")
    if layer._keys is None or layer._values is None:
        raise UserError("a layer holds no keys yet")
    return layer._keys, layer._values


def _whole(tokens: int) -> int:
    return -(-tokens // WHOLE) * WHOLE


def _roomy(summaries: Tensor, seat: Seat) -> Tensor:
    """Room for the summaries of as many tokens as the first body has room for."""
    body = next(iter(seat.layer.bodies.values()))
    assert isinstance(body, GrownBody)
    room = next(held.room for name, held in body.held.items() if body.group(name) == 1)
    pages = -(-room.shape[2] * summaries.shape[2] // max(1, body.slots)) + 1
    batch, heads, _, width = summaries.shape
    return summaries.new_zeros(batch, heads, pages, width)
