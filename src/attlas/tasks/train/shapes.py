"""Shapes on noise: one shape of one colour on a noisy picture, told apart by a convolutional network.

    disc · square · triangle · cross

Each picture is `size` × `size` of uniform noise in [0, 1] and three channels. A shape of random place,
diameter (`least` to `most` pixels) and colour is pasted on it and covers the noise. Colours and places
tell nothing of the class. The masks of the shapes are known, which maps of saliency are held against.
Scored: right classes. Ceiling: 100 %.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, integers, task

NAMES = ("disc", "square", "triangle", "cross")


@task("shapes", needs="convnet")
class Shapes(Task):
    """Four classes, at any place."""

    yardstick: ClassVar[str] = "the classes are known, and every shape is whole"

    size: int = option("height and width of the picture", default=32, at_least=8, at_most=256)
    least: int = option("smallest diameter of a shape", default=10, at_least=5)
    most: int = option("largest one", default=16, at_least=5)

    def setup(self) -> None:
        """Refuse shapes that do not fit."""
        if not self.least <= self.most <= self.size:
            raise ValueError(
                "least, most and size must not fall in this order, got "
                f"{self.least}, {self.most} and {self.size}"
            )

    @property
    def sizes(self) -> Sizes:
        """Three channels."""
        return Sizes(outputs=len(NAMES), length=1, image=(3, self.size, 0))

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Pictures and classes."""
        pixels, classes, _ = self.placed(rng, rows)
        return {"pixel_values": pixels, "targets": classes}

    def placed(
        self, rng: Generator, rows: int
    ) -> tuple[
        Float[Tensor, "rows 3 size size"], Int[Tensor, " rows"], Bool[Tensor, "rows size size"]
    ]:
        """Pictures, classes, and which pixels are the shape's."""
        classes = integers(rng, 0, len(NAMES), rows)
        diameters = integers(rng, self.least, self.most + 1, rows)
        corner = torch.rand(rows, 2, generator=rng) * (self.size - diameters)[:, None]
        middle = corner.floor() + (diameters[:, None] - 1) / 2
        at = torch.arange(self.size, dtype=torch.float32)
        half = diameters[:, None, None] / 2
        y = (at[None, :, None] - middle[:, 0, None, None]) / half
        x = (at[None, None, :] - middle[:, 1, None, None]) / half
        masks = _inside(y.expand(rows, self.size, self.size), x.expand(rows, self.size, self.size))
        masks = masks[classes, torch.arange(rows)]
        noise = torch.rand(rows, 3, self.size, self.size, generator=rng)
        colour = torch.rand(rows, 3, 1, 1, generator=rng)
        return torch.where(masks[:, None], colour, noise), classes, masks


def _inside(
    y: Float[Tensor, "rows size size"], x: Float[Tensor, "rows size size"]
) -> Bool[Tensor, "4 rows size size"]:
    """Which pixels are of each shape, in coordinates whose middle is 0 and whose border is 1."""
    square = (x.abs() <= 1) & (y.abs() <= 1)
    cross = square & ((x.abs() <= 0.34) | (y.abs() <= 0.34))
    triangle = square & (x.abs() <= (1 + y) / 2)
    return torch.stack([x.square() + y.square() <= 1, square, triangle, cross])
