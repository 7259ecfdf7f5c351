"""What is known of a cache's layer beside its tensors, chosen of it, and taken from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jaxtyping import Float, Int
from torch import Tensor

from attlas.storage.rotary import Rotary, Rotation


@dataclass
class LayerState:
    """What a part knows of one layer of one cache.

    Attributes:
        layer: index of the layer.
        full: the model's full-attention layers.
        windows: lengths of the model's sliding-window layers.
        rotary: how the model rotated in the last call of the layer, None when the part does not ask or
            the layer does not rotate.
        scaling: factor of q·k, known after the first call.
        rotation: where `rotary` comes from.
        latent: the layer caches something of which the model makes keys and values.
        tensors: what was gathered from the calls, batch first. It is held with the cache: what is not
            needed once the prompt is over is taken out when the part compresses.
        growing: names of those that grow along their third axis as the layer's first body does.
        counted: names of those that are counted by behind a step, and that no step reads.
    """

    layer: int
    full: tuple[int, ...]
    windows: tuple[int, ...] = ()
    rotary: Rotary | None = None
    scaling: float = 1.0
    latent: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rotation: Rotation | None = None
    growing: tuple[str, ...] = ()
    counted: tuple[str, ...] = ()

    def fork(self) -> LayerState:
        """A copy that shares the tensors, which are never written to."""
        return replace(self, tensors=dict(self.tensors))


@dataclass(frozen=True)
class Chosen:
    """What a selection reads of a layer in one step.

    Attributes:
        index: numbers of pages, −1 for none; by key head, or by query head.
        page: slots of a page.
        slots: number of slots in the layer's first body; later slots are always read.
        scored: bytes that were read in order to choose.
    """

    index: Int[Tensor, "batch list_heads pages"]
    page: int
    slots: int
    scored: int = 0


@dataclass(frozen=True)
class Taken:
    """Slots that `StoredLayer.take` gave away: what a body is made of."""

    k: Float[Tensor, "batch kv_heads slots dim"]
    v: Float[Tensor, "batch kv_heads slots v_dim"]
    index: Int[Tensor, "batch kv_heads slots"] | None
    first: int
