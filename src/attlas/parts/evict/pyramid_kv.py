"""PyramidKV: the first layers, which read broadly, keep more than the last ones, which read little.

With n slots a layer on average, T tokens, w tokens that the scorer always keeps, and layers l = 0…L−1,

    least = n/β,  most = 2n − least;      where most ≥ T − w:  most = T − w,  least = 2n − most
    n_l   = round( most − l (most − least)/(L − 1) )       if w ≤ least ≤ most,  else n

so the layers' budgets add up to L·n. Which keys stay is the scorer's choice, SnapKV's unless another
is named. Cost: the scorer's. Keeps everything, hence reduces to full attention, at keep = 1, and to
the scorer alone where the last condition fails or all layers get the same.

Source: "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", with the
bounds that common implementations add. They round layers of a mean that may be no whole number, which
can hold more than was promised; here the mean is whole and the sum exact.
"""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from attlas.cache.policy import Slots
from attlas.cache.scored import ScoredPolicy
from attlas.catalog.registry import mechanism
from attlas.options import option
from attlas.storage.layer import LayerState


@mechanism(
    "pyramid-kv", paper="snapkv", aliases=("pyramidkv",),
    example={"keep": 0.5, "scorer_options": {"window": 4}},
)  # fmt: skip
class PyramidKV(ScoredPolicy):
    """Budgets that fall from layer to layer, over another policy's scores."""

    replaced: ClassVar[tuple[str, ...]] = (*ScoredPolicy.replaced, "budgets")
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)", "(keep=0.25)", "(keep=0.125)")

    beta: float = option(
        "how steep the pyramid is: the last layer keeps the average divided by it", default=20.0,
        at_least=1,
    )  # fmt: skip

    def budgets(self, state: LayerState, slots: Slots) -> Int[Tensor, " batch"]:
        """This layer's step of the pyramid, for each row by its own length."""
        layers = [layer for layer in state.full if layer not in self.skipped]
        place = layers.index(state.layer), len(layers)
        rows = zip(slots.budget.tolist(), slots.total.tolist(), strict=True)
        found = [
            pyramid(Fraction(mean), total, self.floor[1], self.beta, *place) for mean, total in rows
        ]
        return torch.tensor(found, device=slots.budget.device)


def pyramid(mean: Fraction, tokens: int, window: int, beta: float, number: int, layers: int) -> int:
    """Slots of layer `number` of `layers`; exact fractions, so that symmetric layers round alike."""
    least = mean / Fraction(beta)
    most = 2 * mean - least
    if most >= tokens - window:
        most = Fraction(tokens - window)
        least = 2 * mean - most
    if layers == 1 or not tokens >= most >= least >= window:
        return round(mean)
    return round(most - number * (most - least) / (layers - 1))
