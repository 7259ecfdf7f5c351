"""What a forward pass was given, for every stage to look at, and what it remembers for the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from attlas.masks import Mask

if TYPE_CHECKING:
    from transformers import Cache

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


def with_states(cache: Cache, layer_idx: int) -> Any:
    """The cache's layer, made one that also remembers named tensors.

    Raises:
        ValueError: a static, sliding or quantised layer, which has no room for them.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if not hasattr(layer, "states"):
        if not isinstance(cache, DynamicCache) or type(layer) is not DynamicLayer:
            raise ValueError(
                f"cache must be a DynamicCache, since this mechanism remembers more than keys and "
                f"values; got a {type(cache).__name__} of {type(layer).__name__}"
            )
        fuller = _state_layer()()
        vars(fuller).update(vars(layer))
        layer = cache.layers[layer_idx] = fuller
    return layer


@cache
def _state_layer() -> type:
    """Made on first use, so that importing attlas does not import Transformers' caches."""
    from transformers.cache_utils import DynamicLayer

    class StateLayer(DynamicLayer):  # type: ignore[misc]
        """A dynamic layer with named tensors beside its keys and values, or in their place.

        `seen` counts the tokens of which only the named tensors tell, whose first axis is the batch.
        """

        is_croppable = False  # what a recurrence has taken in cannot be taken out again

        def __init__(self) -> None:
            super().__init__()
            self.states: dict[str, Tensor] = {}
            self.seen = 0

        def get_seq_length(self) -> int:
            return self.seen or int(super().get_seq_length())

        def _each(self, change: Any) -> None:
            self.states = {name: change(state) for name, state in self.states.items()}

        def reset(self) -> None:
            super().reset()
            self.states, self.seen = {}, 0

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove and self.states:
                raise ValueError(f"tokens_to_remove must be 0 here, got {tokens_to_remove}")
            super().crop(tokens_to_remove)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            if self.keys is not None:
                super().reorder_cache(beam_idx)
            self._each(lambda state: state.index_select(0, beam_idx.to(state.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.keys is not None:
                super().batch_repeat_interleave(repeats)
            self._each(lambda state: state.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.keys is not None:
                super().batch_select_indices(indices)
            self._each(lambda state: state[indices])

    return StateLayer
