"""A sum of attention maps: what differential attention and its kin have in common.

    weights = Σ_m c_m · softmax(q_m k_mᵀ · scale)

Each map is a fused call of its own, and their outputs are summed; for a lone query the weights are
summed instead, so that the values are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from attlas.attention import Attention
from attlas.inputs import Inputs


class SumOfMaps(Attention):
    """Attention by several maps over the same values. A subclass gives `maps` and `coefficients`."""

    changes: ClassVar[tuple[str, ...]] = ("normalize",)

    def maps(self, q: Tensor, k: Tensor, inputs: Inputs) -> Sequence[tuple[Tensor, Tensor]]:
        """(q_m, k_m) of each map, as `attend` takes queries and keys."""
        raise NotImplementedError(f"{type(self).__name__} needs maps(q, k, inputs)")

    def coefficients(self, inputs: Inputs) -> Sequence[Tensor | float]:
        """c_m of each map: a number, or a tensor that spreads over [batch, heads, queries, keys]."""
        raise NotImplementedError(f"{type(self).__name__} needs coefficients(inputs)")

    def summed(self, each: Sequence[Tensor], inputs: Inputs) -> Tensor:
        """Σ_m c_m · each_m, of maps or of what they give."""
        pairs = zip(self.coefficients(inputs), each, strict=True)
        total, *rest = (_times(c, x) for c, x in pairs)
        for term in rest:
            total = total + term
        return total

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """The sum of the maps, [batch, heads, queries, keys]."""
        return self.summed(self.each_map(q, k, inputs), inputs)

    def each_map(self, q: Tensor, k: Tensor, inputs: Inputs) -> list[Tensor]:
        """Every map by itself."""
        return [super(SumOfMaps, self).weigh(*pair, inputs) for pair in self.maps(q, k, inputs)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The sum of what the maps give."""
        if q.shape[2] == 1:
            return self.aggregate(self.weigh(q, k, inputs), v, inputs)
        return self.summed(self.outs(q, k, v, inputs), inputs)

    def outs(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> list[Tensor]:
        """What each map gives, in fused calls; for a lone query by its weights, which are few."""
        if q.shape[2] == 1:
            return [self.aggregate(map_, v, inputs) for map_ in self.each_map(q, k, inputs)]
        each = [self.features(*pair, inputs) for pair in self.maps(q, k, inputs)]
        # The fastest kernels of a GPU want values no wider than keys; elsewhere scoring twice is dear.
        wide = v.is_cuda and v.shape[-1] == 2 * each[0][1].shape[-1]
        halves = v.chunk(2, dim=-1) if wide else (v,)
        return [
            torch.cat([self.fused(*pair, half, inputs) for half in halves], dim=-1)
            for pair in each
        ]


def _times(c: Tensor | float, x: Tensor) -> Tensor:
    """c · x, in the precision of x."""
    if isinstance(c, Tensor):
        return c.to(x.dtype) * x
    return x if c == 1.0 else c * x
