"""Seats of Transformers' own layers, for captured steps: full windows, and states."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor

from attlas.errors import UserError
from attlas.hf.caches import DynamicSlidingWindowLayer, LinearAttentionLayer
from attlas.storage.plain import tensors
from attlas.storage.twin import InPlaceSeat


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


class WindowSeat(InPlaceSeat):
    """A sliding window that is full, and so holds as many tokens before a step as behind it.

    Raises:
        ValueError: it is not full.
    """

    def __init__(self, layer: DynamicSlidingWindowLayer) -> None:
        if not is_full(layer):
            raise UserError("a sliding window is not full yet")
        layer.keys, layer.values = (
            t.clone(memory_format=torch.contiguous_format) for t in (layer.keys, layer.values)
        )
        super().__init__(layer, [layer.keys, layer.values])
        layer._seated = True
        self.twin = object.__new__(_StillWindow)
        self.twin.__dict__.update(layer.__dict__)

    @property
    def ready(self) -> bool:
        """Whether the window lies where the recorded step looks for it."""
        layer, (keys, values) = self.layer, self._written
        return layer.keys is keys and layer.values is values and not layer.record_past

    def put_back(self) -> None:
        """Beams in another order; a fork has memory of its own."""
        moved = self.layer.keys, self.layer.values
        if all(now.shape == held.shape for now, held in zip(moved, self._written, strict=True)):
            for held, now in zip(self._written, moved, strict=True):
                if held is not now:
                    held.copy_(now)
            self.layer.keys, self.layer.values = self._written

    def advance(self) -> None:
        """A token more was seen."""
        super().advance()
        self.layer.cumulative_length += 1


class StateSeat(InPlaceSeat):
    """States of a recurrence or a convolution, which Transformers writes to in place; its own twin."""

    def __init__(self, layer: LinearAttentionLayer) -> None:
        super().__init__(layer, list(tensors(layer)))
        self.twin = layer

    @property
    def ready(self) -> bool:
        """Whether the states lie where the recorded step looks for them."""
        now = list(tensors(self.layer))
        return len(now) == len(self._written) and all(map(is_, now, self._written))


def is_full(layer: DynamicSlidingWindowLayer) -> bool:
    """Whether a sliding window holds all that it may."""
    held = layer.keys is not None and layer.keys.ndim == 4
    return held and layer.keys.shape[2] == layer.sliding_window - 1 and not layer.record_past
