"""Handwritten digits somewhere in a larger picture, among specks, told apart by a convolutional network.

The bundled digits (see `digits`), 8 × 8 pixels in [0, 1], each put at a random place of an empty picture
of `size` × `size`; then a share `specks` of all pixels is as bright as a number drawn from [0, 1], where
the digit is not brighter. Test images are of digits that training never shows. Scored: right classes.
Ceiling: 100 %, though specks may hide what tells two digits apart.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, integers, task
from attlas.tasks.train.digits import images

SIDE = 8


@task("digits-shifted", needs="convnet")
class DigitsShifted(Task):
    """Ten classes, at any place."""

    yardstick: ClassVar[str] = "the classes are known, though specks may hide some digits"

    size: int = option("height and width of the picture", default=20, at_least=SIDE, at_most=64)
    specks: float = option("share of pixels that distract", default=0.1, at_least=0, at_most=1)

    @property
    def sizes(self) -> Sizes:
        """One channel."""
        return Sizes(outputs=10, length=1, image=(1, self.size, 0))

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Pictures of digits drawn with replacement."""
        pixels, classes, _ = self.placed(rng, rows, split)
        return {"pixel_values": pixels, "targets": classes}

    def placed(self, rng: Generator, rows: int, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [rows, 1, size, size], classes, and [rows, 2] the digits' upper left corners."""
        digits, classes = images(split)
        chosen = integers(rng, 0, len(classes), rows)
        corners = integers(rng, 0, self.size - SIDE + 1, rows, 2)
        pixels = torch.zeros(rows, 1, self.size, self.size)
        for picture, digit, (top, left) in zip(
            pixels, digits[chosen], corners.tolist(), strict=True
        ):
            picture[:, top : top + SIDE, left : left + SIDE] = (digit + 1) / 2
        bright = torch.rand(pixels.shape, generator=rng)
        bright = bright * (torch.rand(pixels.shape, generator=rng) < self.specks)
        return torch.maximum(pixels, bright), classes[chosen], corners
