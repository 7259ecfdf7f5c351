"""A small operator learner: a field and its coordinates in, layers of attention, a field out.

    h = W_in [field, coordinates];   h += attention(norm(h));   h += MLP(norm(h));   out = W_out norm(h)

Attention runs over the points, without positions of its own: the coordinates say where a point is. A
mechanism that has room for them in its heads (`coordinates=1` for a line, 2 for a square) gets them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from attlas.catalog import registry


class Operator(nn.Module):
    """A field's operator.

    Args:
        inputs: numbers at every point, the field's and then its coordinates.
        outputs: numbers at every point.
        dim: width.
        layers: of attention and MLP.
        heads: of each attention.
        attention: the registered mechanism.
        options: of its constructor.

    Raises:
        ValueError: room for other coordinates than a point has.
    """

    def __init__(
        self, inputs: int, outputs: int, dim: int, layers: int, heads: int, attention: str,
        options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.read = nn.Linear(inputs, dim)
        self.layers = nn.ModuleList(_Block(dim, heads, attention, options) for _ in range(layers))
        given = getattr(self.layers[0].attention, "coordinates", 0)
        if given not in (0, inputs - 1):
            raise ValueError(f"coordinates must be 0 or {inputs - 1} for this task, got {given}")
        self.norm = nn.LayerNorm(dim)
        self.say = nn.Linear(dim, outputs)

    def forward(
        self, values: Float[Tensor, "rows points inputs"]
    ) -> Float[Tensor, "rows points outputs"]:
        """The field that the operator makes of a field."""
        h = self.read(values)
        for layer in self.layers:
            h = layer(h, values)
        said: Tensor = self.say(self.norm(h))
        return said


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, attention: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention: Any = registry.make(attention, dim=dim, heads=heads, **options)
        self.coordinates: int = getattr(self.attention, "coordinates", 0)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, h: Tensor, values: Tensor) -> Tensor:
        places = {"coordinates": values[..., -self.coordinates :]} if self.coordinates else {}
        h = h + self.attention(self.before_attention(h), **places)
        changed: Tensor = h + self.mlp(self.before_mlp(h))
        return changed
