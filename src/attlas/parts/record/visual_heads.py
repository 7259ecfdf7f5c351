"""Visual heads: how much of a head's attention goes to the picture, and how concentrated it is there.

    mass(i)          = Σ_{j in image} A_ij                        of every text query i behind the image
    concentration(i) = 1 − H(A_ij / mass(i), j in image) / log |image|   0 spread evenly, 1 on one token

Both are means over text queries, concentration weighted by mass, so that queries which hardly look at the
picture say little. How the paper joins the two is not known to us: both are told, and heads are ranked by
either. `blind-heads` hides the picture from chosen heads: A' = A without the image's keys, over its sum.

Cost: three sums a head; weights are seen a block at a time. `blind-heads` with no heads is the model.

Source: "Unveiling Visual Perception in Language Models: An Attention Head Analysis Approach".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas.attach.call import Call
from attlas.attach.part import Patch
from attlas.attach.where import Spans, rows_of
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.kinds.analysis import Scores
from attlas.options import option
from attlas.parts.record.sums import SumRecorder


def on_image(
    weights: Float[Tensor, "batch heads query keys"], image: Bool[Tensor, "#batch #heads 1 keys"]
) -> tuple[Float[Tensor, "batch heads query"], Float[Tensor, "batch heads query"]]:
    """(mass, concentration) of every query; an image of one token is concentrated."""
    there = weights * image
    mass = there.sum(dim=-1)
    share = there / mass.clamp(min=torch.finfo(mass.dtype).tiny)[..., None]
    room = image.sum(dim=-1).to(mass).log()
    entropy = torch.special.entr(share).sum(dim=-1)
    return mass, torch.where(room > 0, 1 - entropy / room.clamp(min=1e-9), torch.ones_like(mass))


def rank_correlation(a: Float[Tensor, "*heads"], b: Float[Tensor, "*heads"]) -> float:
    """Spearman's correlation of two scores of the same heads; ties share their mean rank.

    Raises:
        ValueError: other heads, or scores that are all alike.
    """
    if a.shape != b.shape:
        raise UserError(f"scores of {list(a.shape)} and of {list(b.shape)} heads cannot be compared")
    ranks = []
    for x in (a.flatten(), b.flatten()):
        below, same = x[:, None] > x, x[:, None] == x
        ranks.append(below.double().sum(dim=1) + same.double().sum(dim=1) / 2)
    centred = [r - r.mean() for r in ranks]
    size = centred[0].norm() * centred[1].norm()
    if size == 0:
        raise UserError("scores that are all alike rank no heads")
    return float(centred[0] @ centred[1] / size)


def parts_of(
    call: Call, image: Spans, queries: Int[Tensor, " query"],
    keys: Int[Tensor, " keys"] | Int[Tensor, "batch heads keys"],
) -> tuple[Bool[Tensor, "batch query"], Bool[Tensor, "#batch #heads _ keys"]]:  # fmt: skip
    """(which queries are text behind the image, which keys are of the image)."""
    inside = call.in_spans(image)
    behind = inside.cumsum(dim=1) == inside.sum(dim=1, keepdim=True)
    valid = call.forward_pass.valid
    text = behind & ~inside & inside.any(dim=1, keepdim=True)
    text = text if valid is None else text & valid[:, : text.shape[1]].to(text.device)
    if keys.ndim == 1:
        return text[:, queries], inside[:, None, None, keys]
    at = keys.clamp(min=0).long()
    of = inside[:, None].expand(-1, at.shape[1], -1).gather(-1, at) & (keys >= 0)
    return text[:, queries], of[:, :, None]


@mechanism("visual-heads", example={"image": ((2, 8),)})
class VisualHeads(SumRecorder):
    """Records means over text queries, {"mass", "concentration": [layers, batch, heads]}."""

    image: Spans = option("tokens of the image, see `attlas.attach.where`", kw_only=False)

    def setup(self) -> None:
        """Refuse spans that are none."""
        super().setup()
        rows_of(self.image)

    def update(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Add up a block's text queries."""
        text, image = parts_of(call, self.image, queries, keys)
        mass, concentration = on_image(weights, image)
        counts = text[:, None].to(mass).expand_as(mass)
        sums = {"mass": mass * counts, "at": mass * concentration * counts, "count": counts}
        for name, x in sums.items():
            self.add((name, call.layer), x.sum(dim=-1), lambda x=x: list(x.unbind(-1)))  # type: ignore[misc]

    def result(self) -> dict[str, Float[Tensor, "layers batch heads"]]:
        """The means; zero where no text has looked."""
        layers = sorted({layer for _, layer in self._sums})
        mass, at, count = (
            torch.stack([self._sums[n, x] for x in layers]) for n in ("mass", "at", "count")
        )
        tiny = torch.finfo(mass.dtype).tiny
        return {"mass": mass / count.clamp(min=1), "concentration": at / mass.clamp(min=tiny)}

    def head_scores(self) -> Mapping[str, Scores]:
        """Both, as means over the texts."""
        meanings = {
            "mass": "attention that text gives to the image",
            "concentration": "how few of the image's tokens get it",
        }
        return {f"image-{n}": Scores(x.mean(dim=1), meanings[n]) for n, x in self.result().items()}


@mechanism("blind-heads", paper="visual-heads", example={"image": ((2, 8),)})
class BlindHeads(Patch):
    """Takes the image out of what the text attends to in some heads."""

    nothing: ClassVar[dict[str, Any] | None] = {"image": ()}
    beyond = ("normalize: weights on the image are taken out, as the masking experiment asks",)

    image: Spans = option("tokens of the image, see `attlas.attach.where`", kw_only=False)

    def setup(self) -> None:
        """Refuse spans that are none."""
        super().setup()
        rows_of(self.image)

    def normalize(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Float[Tensor, "batch heads query keys"]:
        """A block of weights without the image's share, the rest summing to what all did."""
        text, image = parts_of(call, self.image, queries, keys)
        heads = self.where.over_heads(call.layer, weights.shape[1], weights.device)
        left = weights.masked_fill(image, 0.0)
        whole, rest = weights.sum(dim=-1, keepdim=True), left.sum(dim=-1, keepdim=True)
        left = left * (whole / rest.clamp(min=torch.finfo(rest.dtype).tiny))
        return torch.where(text[:, None, :, None] & heads[:, None, None], left, weights)
