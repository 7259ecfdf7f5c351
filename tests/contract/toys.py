"""Mechanisms that are wrong on purpose, each in one way, and the check that must find it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from attlas import Attention
from attlas.inputs import Inputs
from attlas.supports import Supports


class Good(Attention):
    """Attention that doubles its values: nothing is wrong with it."""

    supports = Supports(memory="quadratic")

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        return 2 * super().aggregate(weights, v, inputs)


class Leaks(Attention):
    """Every token gets the mean of all values, those to come included."""

    def attend(self, q, k, v, inputs):
        return super().attend(q, k, v, inputs) + v.mean(2, keepdim=True)


class ForgetsWhereItIs(Attention):
    """Rotates each chunk as if it stood at the beginning."""

    def position(self, q, k, inputs):
        start = torch.arange(q.shape[2])
        return super().position(q, k, replace(inputs, positions=start))


class BlindRowsAreNaN(Attention):
    """A plain softmax, whose row of nothing but −∞ is 0 / 0."""

    supports = Supports(memory="quadratic")

    def normalize(self, scores, inputs):
        return scores.softmax(-1)


class SeesPadding(Attention):
    """Reads padding as if it were text."""

    def mask(self, q, k, inputs):
        return super().mask(q, k, inputs if inputs.valid is None else replace(inputs, mask=None))


class HasADeadParameter(Attention):
    """A parameter that no output depends on."""

    def setup(self):
        super().setup()
        self.dead = nn.Parameter(torch.ones(3))


class HoldsAllPairs(Attention):
    """Declares linear memory, and makes all weights."""

    def attend(self, q, k, v, inputs):
        return self.aggregate(self.weigh(q, k, inputs), v, inputs)


class ReadsUnwrittenMemory(Attention):
    """Adds what torch.empty happens to hold."""

    def attend(self, q, k, v, inputs):
        heads = super().attend(q, k, v, inputs)
        return heads + 0 * torch.empty_like(heads)


class IsCoarse(Attention):
    """A fused route of lower precision than its stages."""

    def attend(self, q, k, v, inputs):
        return super().attend(q, k, v, inputs).half().to(q.dtype)


class Reseeds(Attention):
    """Sets the seed of the whole program."""

    def attend(self, q, k, v, inputs):
        torch.manual_seed(0)
        return super().attend(q, k, v, inputs)


class IsRandom(Attention):
    """Adds noise while evaluating."""

    def output(self, heads, inputs):
        return super().output(heads + 0.01 * torch.randn_like(heads), inputs)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class HasAWrongGradient(Attention):
    """Its backward pass gives half of the gradient."""

    def output(self, heads, inputs):
        return super().output(_Halved.apply(heads), inputs)


class MixesTheBatch(Attention):
    """Each row gets a little of its neighbour in the batch."""

    def output(self, heads, inputs):
        return super().output(heads + 0.1 * heads.roll(1, 0), inputs)


class FailsOnOddLengths(Attention):
    """Takes pairs of tokens."""

    def output(self, heads, inputs):
        return super().output(heads.unflatten(2, (-1, 2)).flatten(2, 3), inputs)


class SwallowsOptions(Attention):
    """Takes any option and does nothing with it."""

    def __init__(self, dim, heads=8, dropout=0.0, **options):
        super().__init__(dim, heads, **options)


#: Each toy and one check that must fail on it.
BROKEN = {
    Leaks: "causality",
    ForgetsWhereItIs: "decoding",
    BlindRowsAreNaN: "extreme-inputs",
    SeesPadding: "padding",
    HasADeadParameter: "gradients-reach",
    HoldsAllPairs: "memory-law",
    ReadsUnwrittenMemory: "shapes",
    IsCoarse: "twice-the-plain-error",
    Reseeds: "no-trace",
    IsRandom: "deterministic",
    HasAWrongGradient: "finite-differences",
    MixesTheBatch: "batches",
    FailsOnOddLengths: "shapes",
    SwallowsOptions: "wrong-sizes",
}
