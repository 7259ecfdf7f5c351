"""Seats of Transformers' own layers, for captured steps: full windows, and states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attlas.errors import UserError
from attlas.hf.caches import DynamicSlidingWindowLayer, LinearAttentionLayer
from attlas.storage.plain import tensors


class _StillWindow(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A full window whose tokens move by one in place."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All that the token sees; the oldest is let go."""
        k, v = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        self.keys.copy_(k[:, :, 1:])
        self.values.copy_(v[:, :, 1:])
        return k, v


class WindowSeat:
    """A sliding window that is full, and so holds as many tokens before a step as behind it.

    Raises:
        ValueError: it is not full.
    """

    def __init__(self, layer: DynamicSlidingWindowLayer) -> None:
        if not is_full(layer):
            raise UserError("a sliding window is not full yet")
        self.layer = layer
        layer.keys, layer.values = (
            t.clone(memory_format=torch.contiguous_format) for t in (layer.keys, layer.values)
        )
        layer._seated = True  # a fork has to copy what is written to
        self._held = layer.keys, layer.values
        self._before = [t.clone() for t in self._held]
        self.twin = object.__new__(_StillWindow)
        self.twin.__dict__.update(layer.__dict__)

    @property
    def ready(self) -> bool:
        """Whether the window lies where the recorded step looks for it."""
        layer, (keys, values) = self.layer, self._held
        return layer.keys is keys and layer.values is values and not layer.record_past

    def advance(self) -> None:
        """The recorded step has run: a token more was seen."""
        self.layer.cumulative_length += 1
        self._before = []

    def keep(self) -> None:
        """Nothing: the step has written in place."""

    def undo(self) -> None:
        """The window as it was before the first step."""
        for held, before in zip(self._held, self._before, strict=True):
            held.copy_(before)


class StateSeat:
    """States of a recurrence or a convolution, which Transformers writes to in place."""

    def __init__(self, layer: LinearAttentionLayer) -> None:
        self.layer = self.twin = layer
        self._held = list(tensors(layer))
        self._before = [t.clone() for t in self._held]

    @property
    def ready(self) -> bool:
        """Whether the states lie where the recorded step looks for them."""
        now = list(tensors(self.layer))
        same = len(now) == len(self._held)
        return same and all(a is b for a, b in zip(now, self._held, strict=True))

    def advance(self) -> None:
        """The recorded step has run."""
        self._before = []

    def keep(self) -> None:
        """Nothing: the step has written in place."""

    def undo(self) -> None:
        """The states as they were before the first step."""
        for held, before in zip(self._held, self._before, strict=True):
            held.copy_(before)


def is_full(layer: DynamicSlidingWindowLayer) -> bool:
    """Whether a sliding window holds all that it may."""
    held = layer.keys is not None and layer.keys.ndim == 4
    return held and layer.keys.shape[2] == layer.sliding_window - 1 and not layer.record_past
