"""What an adapter remembers of a text beside the keys and values in its cache.

A cache's first layer holds it, so that what moves the rows of a cache (beams, repeated or chosen rows)
moves it too, a copy of a cache has a copy of it, and a reset forgets it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attlas.errors import UserError
from attlas.hf.caches import Cache


def recalled(cache: Cache | None) -> dict[str, Tensor]:
    """What was remembered with a cache, by name; nothing at the beginning."""
    layers = [] if cache is None else cache.layers
    return dict(getattr(layers[0], "beside", {})) if layers else {}


def remember(cache: Cache, tensors: dict[str, Tensor]) -> None:
    """Keep tensors, their batch first, with a cache that its model has filled."""
    layer: Any = cache.layers[0]
    if not hasattr(layer, "beside"):
        kind: Any = type(layer)
        layer.__class__, layer.beside = _with(kind), {}
    layer.beside |= tensors


def longer(before: Tensor | None, new: Tensor) -> Tensor:
    """Tokens of this call behind those before it."""
    return new if before is None else torch.cat((before.to(new.device), new), dim=1)


@lru_cache(maxsize=64)
def _with(kind: Any) -> Any:
    """A class of cache layers that does with what is beside it as with keys and values."""

    class Fuller(kind):  # type: ignore[misc]
        beside: dict[str, Tensor]

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._each(lambda x: x.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._each(lambda x: x[indices])

        def reset(self) -> None:
            super().reset()
            self.beside = {}

        def crop(self, *args: Any, **kwargs: Any) -> None:
            raise UserError("tokens cannot be taken back from this cache: an adapter remembers them")

        def _each(self, change: Callable[[Tensor], Tensor]) -> None:
            self.beside = {name: change(x) for name, x in self.beside.items()}

    Fuller.__name__, Fuller.__qualname__ = kind.__name__, kind.__qualname__
    return Fuller
