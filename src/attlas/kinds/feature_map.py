"""Modules for feature maps: what a convolutional network puts into its blocks.

    y = x · gate(x, previous)            [batch, channels, height, width] → the same

A paper overrides `gate`, or `mix` where its output is not a product with one; nothing else is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from attlas.catalog.kinds import MODULE, Kind
from attlas.network import Network
from attlas.options import Configured, option

Map = Float[Tensor, "batch channels height width"]


class FeatureMap(Configured, Network):
    """A module that reads a feature map and gives one of the same shape, or smaller by its `stride`."""

    kind: ClassVar[Kind] = MODULE
    #: Whether it also reads the maps of earlier stages.
    takes_previous: ClassVar[bool] = False
    #: How the memory of a forward pass grows with height · width: "linear" or "quadratic".
    memory_law: ClassVar[Literal["linear", "quadratic"]] = "linear"
    #: The least height and width, and what both must be a multiple of; an instance may set its own.
    smallest = 1
    multiple = 1
    #: How many rows and columns of the map become one; an instance that shrinks it sets its own.
    stride = 1

    channels: int = option("of the map", at_least=1, kw_only=False)
    previous: Sequence[int] = option(
        "channels of each earlier map that `forward` is given, first those of the stem", default=(),
        at_least=1, kw_only=False,
    )  # fmt: skip

    def setup(self) -> None:
        """Refuse earlier maps where it takes none."""
        self.previous = tuple(self.previous)
        if self.previous and not self.takes_previous:
            raise ValueError(
                f"previous: {type(self).__name__} reads no earlier maps, got {self.previous}"
            )

    def forward(
        self, x: Map, previous: Sequence[Tensor] | None = None
    ) -> Float[Tensor, "batch channels rows columns"]:
        """The map, changed.

        Args:
            x: the present map.
            previous: maps of earlier stages, of any height and width, as the constructor was told.

        Raises:
            ValueError: another number of axes or channels, or a size that it cannot take.
        """
        earlier = tuple(previous or ())
        self._check(x, earlier)
        return self.mix(x, earlier)

    def mix(
        self, x: Map, previous: Sequence[Tensor] = ()
    ) -> Float[Tensor, "batch channels rows columns"]:
        """The output; the map times its gate unless overridden."""
        return x * self.gate(x, previous)

    def gate(self, x: Map, previous: Sequence[Tensor] = ()) -> Float[Tensor, "batch _ _ _"]:
        """The weights of channels or positions, of a shape that spreads over `x`: what pictures draw.

        Raises:
            NotImplementedError: the module has no such weights.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weights of channels or positions")

    def side(self, at_least: int) -> int:
        """The smallest height or width that it takes of at least so many positions."""
        return -(-max(at_least, self.smallest) // self.multiple) * self.multiple

    def _check(self, x: Tensor, previous: tuple[Tensor, ...]) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"x must be [batch, channels={self.channels}, height, width], got {list(x.shape)}"
            )
        height, width = x.shape[2:]
        if min(height, width) < self.smallest:
            raise ValueError(
                f"x must be at least {self.smallest} high and wide, got {height} by {width}"
            )
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"x must have a height and width that are multiples of {self.multiple}, got {height} "
                f"by {width}; pad it"
            )
        shapes = [list(t.shape) for t in previous]
        if [s[:2] for s in shapes] != [[x.shape[0], c] for c in self.previous] or any(
            len(s) != 4 for s in shapes
        ):
            told = f"{len(self.previous)} maps of {list(self.previous)} channels"
            raise ValueError(
                f"previous must be {told if self.previous else 'left out'}, as the constructor was "
                f"told, with the batch of x; got {shapes}"
            )
