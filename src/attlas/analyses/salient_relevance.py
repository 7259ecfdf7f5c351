"""Salient relevance: which pixels a logit comes from, then which area of them draws the eye.

    R       relevance of the pixels (attlas.inspect.relevance), summed over channels
    v       what speaks for the class, max(R, 0), divided by its largest
    d(i, j) = d_value(i, j) / (1 + c d_position(i, j))      of patches; positions as shares of the side
    S_i     = 1 − exp(−1/K Σ over the K patches of smallest d of d(i, j)),   averaged over scales of v

A patch stands out where even those most like it differ, and more so where these are far: background is
like much of the rest. d_value is the root of the mean square of two patches' difference. The paper takes
both from context-aware saliency (c = 3, K = 64, scales 1, 0.8, 0.5, 0.3). It does not say how relevance
of both signs is made a picture; v is ours, and so are patches of 7 × 7 around every pixel (every second
one in each direction where there are more than 64 × 64).

Cost: one forward and one backward pass, then O(patches²) for each scale, a block of patches at a time.
Source: "Beyond saliency: understanding convolutional neural networks from saliency prediction on
layer-wise relevance propagation".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from attlas.catalog.registry import mechanism
from attlas.inspect.pictures import logits_of, resized, targets_of
from attlas.inspect.relevance import RelevanceRules, Rule, relevance
from attlas.inspect.subject import Subject
from attlas.kinds.analysis import Analysis, Findings, Table
from attlas.options import option

#: Patches whose distances to all others are worked out at once; the side beyond which every second
#: place has a patch.
BLOCK, SIDE = 256, 64


def context_saliency(
    maps: Float[Tensor, "rows height width"], *, scales: tuple[float, ...] = (1.0, 0.8, 0.5, 0.3),
    patch: int = 7, nearest: int = 64, distance: float = 3.0,
) -> Float[Tensor, "rows height width"]:  # fmt: skip
    """S of maps between 0 and 1.

    Args:
        maps: one number a place.
        scales: at which it is worked out, the mean counts.
        patch: height and width of patches, odd.
        nearest: K.
        distance: c.
    """
    size, found = maps.shape[-2:], []
    for scale in scales:
        smaller = [max(1, round(side * scale)) for side in size]
        there = F.interpolate(maps[:, None], size=smaller, mode="bilinear", antialias=True)
        found.append(resized(_at_one_scale(there, patch, nearest, distance), size))
    return torch.stack(found).mean(dim=0)


def _at_one_scale(
    maps: Float[Tensor, "rows 1 height width"], patch: int, nearest: int, distance: float
) -> Float[Tensor, "rows tall broad"]:
    high, wide = maps.shape[-2:]
    stride = 2 if max(high, wide) > SIDE else 1
    around = F.pad(maps, [patch // 2] * 4, mode="replicate")
    patches = F.unfold(around, patch, stride=stride).mT / patch  # rows, patches, values
    tall, broad = -(-high // stride), -(-wide // stride)
    at = torch.cartesian_prod(torch.arange(tall), torch.arange(broad)).to(maps) * stride
    at = at / max(high, wide)
    count = min(nearest, patches.shape[1])
    found = []
    for begin in range(0, patches.shape[1], BLOCK):
        block = slice(begin, begin + BLOCK)
        values = torch.cdist(patches[:, block], patches, compute_mode="donot_use_mm_for_euclid_dist")
        apart = values / (1 + distance * torch.cdist(at[block], at))
        found.append(apart.topk(count, dim=-1, largest=False).values.mean(dim=-1))
    flat: Tensor = 1 - torch.cat(found, dim=1).neg().exp()
    return flat.reshape(-1, tall, broad)


@mechanism("salient-relevance", paper="salient-relevance")
class SalientRelevance(Analysis):
    """The relevance of pixels for a class of a picture, and the area of it that stands out."""

    needs = "pictures"
    wants_gradients: ClassVar[bool] = True

    linear: Rule = option("rule of linear layers", default="epsilon")
    conv: Rule = option("rule of convolutions", default="epsilon")
    epsilon: float = option("of the ε-rule", default=1e-9, at_least=0)
    alpha: float = option("of the αβ-rule, whose β is α − 1", default=1.0, at_least=1)
    scales: tuple[float, ...] = option(
        "at which the map is looked at", default=(1.0, 0.8, 0.5, 0.3), above=0, at_most=1
    )
    patch: int = option("height and width of a patch, odd", default=7, at_least=1)
    nearest: int = option("patches most alike that a patch is held against", default=64, at_least=1)
    distance: float = option("how much far patches count as unlike", default=3.0, at_least=0)

    def setup(self) -> None:
        """Refuse patches without a middle, and no scale at all."""
        if self.patch % 2 == 0:
            raise ValueError(f"patch must be odd, got {self.patch}")
        if not self.scales:
            raise ValueError("scales takes one or more, got ()")

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Relevance and its saliency for the label of each picture, or its likeliest class."""
        maps, logits = self.relevance(subject)
        tick(0.3)
        speaks = maps.clamp(min=0)
        largest = speaks.amax(dim=(1, 2), keepdim=True)
        speaks = torch.where(largest > 0, speaks / largest, 0.0)
        area = context_saliency(speaks, scales=self.scales, patch=self.patch, nearest=self.nearest,
                                distance=self.distance)  # fmt: skip
        tick(1.0)
        held = maps.sum(dim=(1, 2))
        pairs = enumerate(zip(logits.tolist(), held.tolist(), strict=True))
        rows = [(i, logit, kept) for i, (logit, kept) in pairs]
        return Findings(
            arrays={"relevance": maps, "saliency": area},
            tables=[Table("What of a logit reaches the pixels; biases hold the rest",
                          ("picture", "logit", "relevance of its pixels"), rows)],
        )  # fmt: skip

    def relevance(
        self, subject: Subject
    ) -> tuple[Float[Tensor, "rows height width"], Float[Tensor, " rows"]]:
        """Relevance of the pixels, summed over channels, and the logits that it is of."""
        assert subject.pixel_values is not None
        pixels = subject.pixel_values.to(subject.device).detach().requires_grad_()
        given = Subject(subject.model, pixel_values=pixels, labels=subject.labels)
        rules = RelevanceRules(self.linear, self.conv, epsilon=self.epsilon, alpha=self.alpha)
        with torch.enable_grad(), rules:
            logits = logits_of(given)
        classes = targets_of(given, logits.detach())
        (found,) = relevance(logits, classes, [pixels])
        return found.sum(dim=1), logits.detach().gather(1, classes[:, None])[:, 0]
