"""Modules for feature maps that are wrong on purpose, each in one way, and the check for it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from attlas.kinds.feature_map import FeatureMap
from attlas.options import option


class Good(FeatureMap):
    """Every channel is weighed by its mean over the map."""

    def setup(self) -> None:
        super().setup()
        weight = torch.randn(self.channels, self.channels) / self.channels
        self.weight = nn.Parameter(weight)

    def gate(self, x, previous=()):
        return (x.mean((2, 3)) @ self.weight)[..., None, None].sigmoid()


class ReadsEarlier(Good):
    """Weighs channels by an earlier map's, in windows of 2 × 2 that it keeps apart."""

    takes_previous = True
    multiple = 2
    smallest = 4

    previous: tuple[int, ...] = option("channels of the map", default=(3,), kw_only=False)

    def setup(self) -> None:
        super().setup()
        self.read = nn.Linear(self.previous[0], self.channels)

    def gate(self, x, previous=()):
        return super().gate(x) * self.read(previous[0].mean((2, 3)))[..., None, None]


class LooksAtTheBatch(Good):
    """Weighs by the whole batch's mean."""

    def gate(self, x, previous=()):
        return super().gate(x.mean(0, keepdim=True))


class FixedSize(Good):
    """Cuts the last row off."""

    def mix(self, x, previous=()):
        return super().mix(x)[:, :, :-1]


class FollowsStrides(Good):
    """Reads memory in the order in which it lies."""

    def gate(self, x, previous=()):
        return x.as_strided((x.shape), torch.empty(x.shape).stride()).sigmoid()


class Narrows(Good):
    """Computes in half the precision that it was given."""

    def gate(self, x, previous=()):
        return super().gate(x.to(torch.bfloat16).to(x.dtype))


class Overflows(Good):
    """A softmax over positions without its greatest subtracted."""

    def gate(self, x, previous=()):
        loud = x.mean(1, keepdim=True).exp()
        return super().gate(x) + loud / loud.sum((2, 3), keepdim=True)


class AllPairs(Good):
    """Every position looks at every other, and says that it does not."""

    def gate(self, x, previous=()):
        flat = x.flatten(2)
        mixed = flat @ (flat.mT @ flat).softmax(-1)
        return mixed.view_as(x).sigmoid() + super().gate(x)


class TakesAnySize(Good):
    """Checks nothing."""

    def _check(self, x, previous):
        pass

    def gate(self, x, previous=()):
        return x.mean((-2, -1), keepdim=True).sigmoid() * self.weight.mean()


class IgnoresEarlier(ReadsEarlier):
    """Takes an earlier map and does not read it."""

    def gate(self, x, previous=()):
        return Good.gate(self, x) * self.read.weight.mean() * self.read.bias.mean()


class GateOfAnotherShape(Good):
    """A gate that does not spread over the map."""

    def gate(self, x, previous=()):
        return super().gate(x)[..., 0]

    def mix(self, x, previous=()):
        return x * self.gate(x)[..., None]


class DeadParameter(Good):
    """A parameter that no output depends on."""

    def setup(self) -> None:
        super().setup()
        self.dead = nn.Parameter(torch.ones(3))


class Undeclared(Good):
    """A law that there is not."""

    memory_law: ClassVar[str] = "cubic"


BROKEN = {
    LooksAtTheBatch: "batches", FixedSize: "shapes", FollowsStrides: "layouts",
    Narrows: "twice-the-plain-error", Overflows: "extreme-inputs", AllPairs: "memory-law",
    TakesAnySize: "wrong-sizes", IgnoresEarlier: "earlier-maps", GateOfAnotherShape: "gated",
    DeadParameter: "gradients-reach", Undeclared: "memory-law",
}  # fmt: skip
