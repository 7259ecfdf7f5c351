"""What a layer of ours asks of a cache beside keys and values, and may not ask in a recorded step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from attlas.errors import UserError

if TYPE_CHECKING:
    from attlas.hf.caches import Cache
    from attlas.storage.layer import StoredLayer


class Unasked:
    """Positions of keys in a recorded step (`attlas.attach.captured`), whatever their number.

    Args:
        places: where the keys stand of which all the room is looked at, hidden ones included.
    """

    def __init__(self, places: Callable[[], Tensor]) -> None:
        self.places = places

    def __getattr__(self, name: str) -> object:
        raise UserError("a layer looks at where all keys stand")


def alone(k: Tensor, v: Tensor, sides: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A recorded step's own key and value: those before it are read where they lie.

    Raises:
        ValueError: the layer carries more than these.
    """
    if sides:
        raise UserError(f"a layer carries {', '.join(sides)} beside its keys")
    return k, v


def layer_of(cache: Cache | None, layer_idx: int) -> object:
    """The cache's layer of this number; None where there is none yet."""
    layers = [] if cache is None else cache.layers
    return layers[layer_idx] if layer_idx < len(layers) else None


def with_states(cache: Cache, layer_idx: int) -> StoredLayer:
    """The cache's layer, made one that also remembers named tensors.

    Raises:
        ValueError: a static, sliding or quantised layer, which has no room for them.
    """
    from attlas.hf.caches import DynamicCache, DynamicLayer
    from attlas.storage.layer import StoredLayer

    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, StoredLayer):
        if not isinstance(cache, DynamicCache) or type(layer) is not DynamicLayer:
            raise ValueError(
                f"cache must be a DynamicCache, since this mechanism remembers more than keys and "
                f"values; got a {type(cache).__name__} of {type(layer).__name__}"
            )
        fuller = cache.layers[layer_idx] = StoredLayer()
        fuller.take_over(layer)
        return fuller
    return layer
