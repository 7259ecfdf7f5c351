"""The rows of DINT's attention map: they sum to one, those of the differential map do not."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.catalog.registry import make, mechanism
from attlas.kinds.study import Beats, Row, Study, Within
from attlas.options import option


@mechanism("dint-transformer-rows", paper="dint-transformer", example={"dim": 16, "length": 8})
class DintRows(Study):
    """Row sums of random layers of both kinds, in float64."""

    claim = "the rows of its map sum to one, those of the differential map do not"
    on_gpu = False
    expects = (
        Within("dint-transformer", most=1e-6),
        Beats("dint-transformer", "differential-transformer"),
    )

    dim: int = option("width of the layers", default=64, at_least=1)
    heads: int = option("of each layer", default=4, at_least=1)
    length: int = option("tokens", default=64, at_least=1)
    depth: int = option("of the layer, which sets the differential map's λ", default=6, at_least=1)

    @property
    def set_up(self) -> str:
        """What is measured, and on what."""
        return f"largest |row sum − 1| of random layers, {self.length} tokens, depth {self.depth}"

    def run(self, seed: int) -> Iterator[Row]:
        """The largest distance of a row's sum from one, of each kind of layer."""
        sizes = {"dim": self.dim, "heads": self.heads, "depth": self.depth, "causal": True}
        for name in ("differential-transformer", "dint-transformer"):
            torch.manual_seed(seed)
            layer = make(name, **sizes).double()
            weights = layer.weights(torch.randn(2, self.length, self.dim, dtype=torch.float64))
            yield Row(name, float((weights.sum(-1) - 1).abs().max().detach()), "", "lower")
