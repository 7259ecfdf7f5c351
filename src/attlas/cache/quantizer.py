"""What every quantiser has in common: encode the context, keep the newest tokens as they are."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import nn

from attlas.attach.call import Call
from attlas.cache.part import CachePart, Role, absorb
from attlas.errors import UserError
from attlas.ops.quantize import PLANES
from attlas.storage.body import Body
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.rows import Rows


def offered(**bits: int) -> None:
    """Nothing, if numbers can be held in so many bits; 16 are as they came.

    Raises:
        ValueError: they cannot, naming the option.
    """
    for name, number in bits.items():
        if number not in (16, *PLANES):
            raise UserError(f"{name} takes 16 or one of {sorted(PLANES)}, got {number}")


class Quantizer(CachePart):
    """Base of the quantisers. A subclass gives `encode`."""

    #: Rounding changes scores and what is summed.
    changes: ClassVar[tuple[str, ...]] = ("score", "aggregate")
    role: ClassVar[Role] = "quantize"
    joins: ClassVar[tuple[Role, ...]] = ("evict", "select")

    #: Newest tokens that stay in full precision; most quantisers declare it as an option.
    recent = 0
    #: Tokens that are encoded at once; what is encoded is a whole number of blocks. Likewise.
    block = 1

    def encode(self, state: LayerState, taken: Taken) -> dict[str, Body]:
        """Bodies, by name, that hold these tokens: one, or several of different precision."""
        raise NotImplementedError

    def formats(self, model: nn.Module) -> None:
        """Refuse a model whose heads cannot be encoded so."""

    def check(self, model: nn.Module) -> None:
        """Refuse models without a growing cache, or with heads of a width that codes do not fit."""
        super().check(model)
        self.formats(model)

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Encode all but the newest tokens."""
        absorb(layer, rows, partial(self.encode, state), recent=self.recent, block=self.block)

    @property
    def captures(self) -> bool:
        """What is no longer new is encoded behind the step."""
        counts = type(self).later is Quantizer.later and type(self).learn is CachePart.learn
        return counts and self._silent()

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Learn from the call, and encode what is no longer new, a block at a time."""
        self.learn(state, call)
        self.compress(layer, state, call.rows)
