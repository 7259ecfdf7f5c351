"""DiSRT: does a vision model see how parts stand to each other, or the parts alone?

    triplet      (an image, a broken version of it, another broken version)
    broken       the same patches in random order, or a texture of the same amplitudes by frequency
    odd one out  argmax_i Σ_j ‖f_i − f_j‖ of a model's features f; right where it is the image
    top-k        the k largest units of each token are kept, the others are 0

Features of local texture alone are those of the broken versions: ties, which count 1/3. Besides
triplets there are illusory contours (a square of four notched discs, or turned ones), proximity (dots
in rows or in columns) and figure and ground (a disc whose stripes are other than those around it).

As a task of `attlas train` a vision transformer tells images, outlines that close, from broken ones. Its
title and the triplets rest on a digest of the paper; of its texture synthesis only that amplitudes are
kept is taken over. The published test uses photographs.

Shapes: pictures [batch 3 size size]. Reduces to the identity for top-k with k = width.
Source: "From Local Cues to Global Percepts: Emergent Gestalt Organization in Self-Supervised Vision
Models".
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, integers

Breaking = Literal["shuffle", "texture"]


@mechanism("disrt-gestalt", paper="disrt-gestalt", example={"size": 32, "patch": 8})
class Gestalt(Task):
    """Images against versions whose parts are the same and whose whole is broken."""

    name: ClassVar[str] = "disrt-gestalt"
    needs: ClassVar[str] = "vit"
    yardstick: ClassVar[str] = "a closed outline against its shuffled patches"

    size: int = option("height and width of a picture", default=64, at_least=16)
    patch: int = option("of the vision transformer, and of what is shuffled", default=16, at_least=2)
    breaking: Breaking = option("how wholes are broken", default="shuffle")

    def setup(self) -> None:
        """Refuse patches that do not tile the picture."""
        if self.size % self.patch or self.size == self.patch:
            raise UserError(
                f"patch must divide size={self.size} into several pieces, got {self.patch}"
            )

    @property
    def sizes(self) -> Sizes:
        """Two classes, in colour."""
        return Sizes(outputs=2, length=(self.size // self.patch) ** 2, image=(3, self.size, self.patch))

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Images, half of them broken, which is class 1."""
        pictures, targets = outlines(rng, rows, self.size), integers(rng, 0, 2, rows)
        broken = self.broken(rng, pictures)
        chosen = torch.where(targets.bool()[:, None, None, None], broken, pictures)
        return {"pixel_values": chosen, "targets": targets}

    def broken(
        self, rng: Generator, pictures: Float[Tensor, "rows 3 size size"]
    ) -> Float[Tensor, "rows 3 size size"]:
        """The parts of each picture without its whole."""
        if self.breaking == "texture":
            return texture(rng, pictures)
        return shuffle(rng, pictures, self.patch)

    def triplets(
        self, rng: Generator, pictures: Float[Tensor, "rows 3 size size"]
    ) -> Float[Tensor, "rows 3 3 size size"]:
        """Each picture, the odd one, with two broken versions of it."""
        return torch.stack([pictures, self.broken(rng, pictures), self.broken(rng, pictures)], dim=1)


def odd_one_out(features: Float[Tensor, "rows 3 width"]) -> float:
    """The share of triplets of which the first is farthest from the others; a tie is shared."""
    far = torch.cdist(features.double(), features.double()).sum(-1)
    margin = 1e-6 * features.double().norm(dim=-1).amax(1, keepdim=True)
    best = far >= far.amax(1, keepdim=True) - margin
    return float((best[:, 0] / best.sum(1)).mean())


class TopK(nn.Module):
    """The k largest units of each token; the others are 0.

    Raises:
        ValueError: a k below 1.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise UserError(f"k takes a whole number of at least 1, got {k}")
        self.k = k

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """What is kept, in its place."""
        best = x.topk(min(self.k, x.shape[-1]), dim=-1)
        return torch.zeros_like(x).scatter(-1, best.indices, best.values)


def shuffle(
    rng: Generator, pictures: Float[Tensor, "rows 3 size size"], patch: int
) -> Float[Tensor, "rows 3 size size"]:
    """The patches of each picture in random order."""
    pieces = pictures.unfold(2, patch, patch).unfold(3, patch, patch).flatten(2, 3)
    order = torch.rand(pieces.shape[0], pieces.shape[2], generator=rng).argsort(1)
    mixed = pieces.gather(2, order[:, None, :, None, None].expand_as(pieces))
    side = pictures.shape[-1] // patch
    whole: Tensor = mixed.unflatten(2, (side, side)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return whole


def texture(
    rng: Generator, pictures: Float[Tensor, "rows 3 size size"]
) -> Float[Tensor, "rows 3 size size"]:
    """Pictures of the same amplitude at every frequency whose phases are random, one for all colours."""
    amplitude = torch.fft.rfft2(pictures)
    noise = torch.rand(len(pictures), 1, *pictures.shape[-2:], generator=rng)
    phase = torch.fft.rfft2(noise).angle()
    phase[..., 0, 0] = 0
    turned = amplitude * torch.polar(torch.ones_like(phase), phase)
    found: Tensor = torch.fft.irfft2(turned, s=pictures.shape[-2:])
    return found


def outlines(rng: Generator, rows: int, size: int) -> Float[Tensor, "rows 3 size size"]:
    """Closed wavy outlines of random colours on random grounds, in [0, 1]."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size),) * 2, indexing="ij")
    drawn = torch.rand(rows, 12, generator=rng)
    angle = torch.atan2(y, x)
    radius = (x.square() + y.square()).sqrt()
    waves = 2 + (drawn[:, 0] * 4).floor()[:, None, None]
    edge = 0.6 + 0.2 * (waves * angle + 2 * math.pi * drawn[:, 1, None, None]).cos()
    line = torch.exp(-(((radius - edge) / 0.06) ** 2))[:, None]
    colour, ground = drawn[:, 2:5, None, None], drawn[:, 5:8, None, None]
    # As unlike as they can be: a line of the ground's own colour would show nothing.
    colour = torch.where((colour - ground).abs() < 0.4, (ground + 0.5) % 1.0, colour)
    return line * colour + (1 - line) * ground


def illusory_contours(rng: Generator, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """(pictures of four notched discs, of the same discs turned, which show no square)."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, size),) * 2, indexing="ij")
    reach = 0.4 + 0.15 * torch.rand(rows, 1, 1, generator=rng)
    found = []
    for turn in (1, -1):
        pictures = torch.ones(rows, size, size)
        for up in (-1, 1):
            for left in (-1, 1):
                dy, dx = y - up * reach, x - left * reach
                disc = dy.square() + dx.square() < 0.09
                notch = (dy * up * turn < 0) & (dx * left * turn < 0)
                pictures = pictures.masked_fill(disc & ~notch, 0.0)
        found.append(pictures[:, None].expand(-1, 3, -1, -1))
    return found[0], found[1]


def proximity(rng: Generator, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """(dots nearer to each other along rows, the same along columns)."""
    near, far = size // 8, size // 4
    start = integers(rng, 0, near, rows, 2)
    pictures = torch.ones(rows, size, size)
    for picture, (top, left) in zip(pictures, start.tolist(), strict=True):
        for row in range(top, size - 1, far):
            for column in range(left, size - 1, near):
                picture[row : row + 2, column : column + 2] = 0
    found = pictures[:, None].expand(-1, 3, -1, -1)
    return found, found.mT


def figure_ground(rng: Generator, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """(a disc of upright stripes on lying ones, the same with stripes exchanged)."""
    y, x = torch.meshgrid(*(torch.arange(size),) * 2, indexing="ij")
    centre = size * (0.35 + 0.3 * torch.rand(rows, 2, 1, 1, generator=rng))
    disc = (y - centre[:, 0]).square() + (x - centre[:, 1]).square() < (size / 4) ** 2
    upright, lying = ((axis // 2 % 2).float() for axis in (x, y))
    one, other = torch.where(disc, upright, lying), torch.where(disc, lying, upright)
    return one[:, None].expand(-1, 3, -1, -1), other[:, None].expand(-1, 3, -1, -1)
