"""What a forward pass was given, for every stage to look at, and what it remembers for the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from attlas.masks import Mask

if TYPE_CHECKING:
    from attlas.hf.caches import Cache
    from attlas.storage.layer import StoredLayer

#: What a layer's `mask` argument takes: a pattern; True at real tokens; or pair by pair.
MaskLike = Mask | Bool[Tensor, "batch keys"] | Bool[Tensor, "b h queries keys"]


@dataclass(frozen=True)
class Inputs:
    """What every stage of one forward pass may read besides what the stage before it gave.

    Attributes:
        x: inputs of the queries, with absolute positions added where the layer has them.
        context: inputs of the keys and values; x where there is none.
        positions: of x's tokens.
        key_positions: of the keys, cached ones included.
        mask: as the caller gave it.
        cache: the Transformers cache that this pass extends.
        layer_idx: which of the cache's layers is this layer's.
        extras: further tensors, by the names that the mechanism declares as its `extras`.
    """

    x: Float[Tensor, "batch queries dim"]
    context: Float[Tensor, "batch keys dim"] | None
    positions: Integer[Tensor, "... queries"]
    key_positions: Integer[Tensor, "... all_keys"]
    mask: MaskLike | None = None
    cache: Cache | None = None
    layer_idx: int = 0
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        """What keys and values are made of."""
        return self.x if self.context is None else self.context

    @property
    def token_positions(self) -> Tensor:
        """Positions of `tokens`."""
        return self.positions if self.context is None else self.key_positions

    def positions_of(self, keys: int) -> Tensor:
        """Where the last `keys` keys stand: cached ones by their order, `tokens` as they were told."""
        new = self.token_positions
        old = self.key_positions[..., -keys:][..., : keys - new.shape[-1]]
        rows = torch.broadcast_shapes(old.shape[:-1], new.shape[:-1])
        return torch.cat((old.expand(*rows, -1), new.expand(*rows, -1)), dim=-1)

    @property
    def real(self) -> Bool[Tensor, "batch all_keys"] | None:
        """True at tokens, False at padding, cached ones included; None without padding."""
        per_token = isinstance(self.mask, Tensor) and self.mask.ndim == 2
        return self.mask.bool() if per_token else None  # type: ignore[union-attr]

    @property
    def real_now(self) -> Bool[Tensor, "batch keys"] | None:
        """`real` at this pass's own tokens."""
        return None if self.real is None else self.real[:, -self.tokens.shape[1] :]

    def recall(self, name: str) -> Tensor | None:
        """What the pass before this one remembered under `name`; None at the beginning."""
        layers = [] if self.cache is None else self.cache.layers
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        return None if layer is None else getattr(layer, "states", {}).get(name)

    def remember(self, name: str, value: Tensor) -> None:
        """Keep a tensor, its batch first, for the next pass with this cache; nothing without one.

        Raises:
            ValueError: a cache whose layers cannot hold more than keys and values.
        """
        if self.cache is not None:
            with_states(self.cache, self.layer_idx).states[name] = value

    def advance(self) -> None:
        """Count this pass's tokens as seen, in a cache that keeps no keys of them.

        Raises:
            ValueError: a cache whose layers cannot hold more than keys and values.
        """
        if self.cache is not None:
            with_states(self.cache, self.layer_idx).seen += self.x.shape[1]


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
