"""Twins: a layer of a cache as a recorded step sees it, its numbers on the device (`storage.seat`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attlas.errors import UserError
from attlas.ops.placing import place_token
from attlas.ops.segments import Dense, Segment
from attlas.storage.layer import Chosen, StoredLayer


class Twin(StoredLayer):
    """The layer as the recorded step sees it; nothing that Python counts changes in it.

    Attributes:
        slot: where the step's token is written, [1] int64 on the device.
        count: dense slots that are filled with it, [batch, kv_heads] int32.
        visible: which of them hold a token that is no padding, [batch, kv_heads, 1, room]; None for all.
        latent: the model makes keys of what is held, or reads them by itself: it is given all the room.
        moved: tokens stand elsewhere than in the order of their slots.
    """

    slot: Tensor
    count: Tensor
    visible: Tensor | None = None
    latent: bool = False
    moved: bool = False
    #: Segments that the step was given of the bodies, and bytes that it chose by.
    told: tuple[Segment, ...] = ()
    scored = 0

    @property
    def managed(self) -> bool:
        """It is read through attlas."""
        return True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the token where `slot` says; gives it alone, or of latents all the room."""
        assert self._keys is not None
        assert self._values is not None
        keys, values = self._keys.room, self._values.room
        place_token(keys, values, self.slot, key_states, value_states)
        return (keys, values) if self.latent else (key_states, value_states)

    def filled(self) -> Tensor:
        """Which slots of all the room hold a token that is no padding, [batch, kv_heads, room]."""
        there = self._slots() < self.count[..., None]
        return there if self.visible is None else there & self.visible[:, :, 0]

    def places(self) -> Tensor:
        """Where the tokens of all the room stand, [room], or with padding [batch, room].

        Raises:
            ValueError: they do not stand in the order of their slots, or other slots are looked at.
        """
        if not self.latent or self.moved or "positions" in self.states:
            raise UserError("a layer looks at where all keys stand")
        if self.visible is None:
            return self._slots()
        return (self.filled()[:, 0].cumsum(-1) - 1).clamp(min=0)

    def original_positions(self) -> Tensor:
        """The slots of all the room, −1 where none is filled: how many are the device alone knows."""
        return torch.where(self.filled(), self._slots(), -1)

    def _slots(self) -> Tensor:
        assert self._keys is not None
        return torch.arange(self._keys.room.shape[2], device=self.slot.device)

    def read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(keys, values, which slots are filled) of all the room.

        Raises:
            ValueError: some keys are encoded.
        """
        if self.bodies:
            raise UserError("encoded keys are looked at one by one")
        assert self._keys is not None
        assert self._values is not None
        return self._keys.room, self._values.room, self.original_positions()

    def segments(
        self, visible: Tensor | None = None, chosen: Chosen | None = None
    ) -> list[Segment]:
        """The bodies with all their room, and the dense slots."""
        found = super().segments(visible, chosen)
        self.told = tuple(found[: len(self.bodies)])
        self.scored = 0 if chosen is None else chosen.scored
        return found

    def _dense_segments(self, visible: Tensor | None) -> list[Segment]:
        assert self._keys is not None
        assert self._values is not None
        return [Dense(self._keys.room, self._values.room, self.count, self.visible)]


class InPlaceSeat:
    """A layer whose tensors a recorded step writes where they lie, so that a fork has to copy them.

    Args:
        layer: of a cache.
        written: its tensors that the step writes.
    """

    def __init__(self, layer: Any, written: list[Tensor]) -> None:
        self.layer, self._written = layer, written
        self._before = [t.clone() for t in written]

    def keep(self) -> None:
        """At the end of the step: what it made goes where the layer holds it, unless it lies there."""

    def put_back(self) -> None:
        """What was moved, as beams are, goes back where the step writes it, where that can be told."""

    def advance(self) -> None:
        """The recorded step has run: what was before the first is wanted no more."""
        self._before = []

    def undo(self) -> None:
        """The tensors as they were before the first step, which failed."""
        for held, before in zip(self._written, self._before, strict=True):
            held.copy_(before)


class EmptySeat(InPlaceSeat):
    """A layer that holds nothing, as its model's layer reads what another one holds; its own twin."""

    ready = True

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, [])
        self.twin = layer


class MemorySeat(InPlaceSeat):
    """A layer that holds named states, and its twin, which writes them where they lie."""

    def __init__(self, layer: StoredLayer) -> None:
        self._held = layer.states = {name: state.clone() for name, state in layer.states.items()}
        super().__init__(layer, list(self._held.values()))
        layer.seated = True
        self.twin: StoredLayer = object.__new__(StoredLayer)
        self.twin.__dict__.update(layer.__dict__)
        self.twin.states = dict(self._held)

    @property
    def ready(self) -> bool:
        """Whether the states lie where the recorded step looks for them."""
        now = self.layer.states
        return now.keys() == self._held.keys() and all(now[n] is t for n, t in self._held.items())

    def keep(self) -> None:
        """What the twin remembers, where the layer's states lie.

        Raises:
            ValueError: a state that is new or has grown.
        """
        for name, state in self.twin.states.items():
            held = self._held.get(name)
            if held is None or held.shape != state.shape:
                raise UserError(f"the state {name!r} grows with every token")
            if state is not held:
                held.copy_(state)
        self.twin.states = dict(self._held)

    def advance(self) -> None:
        """A token more was seen."""
        super().advance()
        self.layer.seen += 1
