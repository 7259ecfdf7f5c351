"""Handwritten digits, 8 × 8 grey pixels, told apart by a ViT.

1797 images by 43 writers, from the UCI repository, as scikit-learn ships them (extra `digits`).
Every fifth is kept for the test. Scored: right classes. Ceiling: 100 %; a support vector machine
reaches about 99 % with a random split.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Generator, Tensor

from attlas.errors import UserError
from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, Task, integers, task


@task("digits", needs="vit")
class Digits(Task):
    """Ten classes."""

    yardstick: ClassVar[str] = "the classes are known, though some digits are hard to read"

    patch: int = option("height and width of a patch in pixels: 1, 2 or 4", default=2)

    def setup(self) -> None:
        """Refuse patches that do not fill a picture."""
        if self.patch not in (1, 2, 4):
            raise ValueError(f"patch must be 1, 2 or 4, got {self.patch}")

    @property
    def sizes(self) -> Sizes:
        """One channel."""
        return Sizes(outputs=10, length=(8 // self.patch) ** 2 + 1, image=(1, 8, self.patch))

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Images drawn with replacement."""
        pixels, classes = images(split)
        chosen = integers(rng, 0, len(classes), rows)
        return {"pixel_values": pixels[chosen], "targets": classes[chosen]}


@cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """Pixels in [−1, 1] and classes.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "task 'digits' needs scikit-learn, which ships the images: pip install attlas[digits]"
        ) from None
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    classes = torch.tensor(data.target, dtype=torch.long)
    tested = torch.arange(len(classes)) % 5 == 4
    chosen = tested if split != "train" else ~tested
    return pixels[chosen], classes[chosen]
