"""In-context linear regression: points and their values are shown, the next value is asked for.

    x₁ y₁ x₂ y₂ … x_k → y_k        y = w·x,  w and x from N(0, 1), w new in every row

Inputs are numbers: `dim` for x, one for y, and at a place that holds x that of y is 0 and the other
way round. Trained: the squared error at every x. Scored: the squared error divided by `dim` (what
saying 0 gives), for x after `dim` shown points or more, from where least squares is exact. Floor: 0.
Source: "What Can Transformers Learn In-Context? A Case Study of Simple Function Classes".
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from attlas.options import option
from attlas.tasks.train.base import Batch, Score, Sizes, Task, task


@task("regression", needs="decoder")
class Regression(Task):
    """Linear functions learnt from their points."""

    judged: ClassVar[Score] = Score("squared error", "lower", 1.0, 3)
    best: ClassVar[float | None] = 0.0
    yardstick: ClassVar[str] = (
        "least squares makes no error from the dim-th shown point on; 1: says 0"
    )

    dim: int = option("numbers of x", default=4, at_least=1)
    points: int = option("points of a row, more than dim", default=16, at_least=2)

    def setup(self) -> None:
        """Refuse points that do not decide a function."""
        if self.dim >= self.points:
            raise ValueError(
                f"dim must lie between 1 and points - 1, got {self.dim} of {self.points} points"
            )

    @property
    def sizes(self) -> Sizes:
        """x and y by turns; one number comes out."""
        return Sizes(outputs=1, length=2 * self.points - 1, inputs=self.dim + 1)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Functions and their points."""
        w = torch.randn(rows, self.dim, 1, generator=rng)
        x = torch.randn(rows, self.points, self.dim, generator=rng)
        y = x @ w
        shown = torch.cat([x, torch.zeros_like(y)], dim=-1)
        valued = torch.cat([torch.zeros_like(x), y], dim=-1)
        values = torch.stack([shown, valued], dim=2).flatten(1, 2)[:, :-1]
        return {"inputs": values, "targets": y[..., 0]}

    def terms(self, batch: Batch) -> int:
        """Values."""
        return batch["targets"].numel()

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Squared errors at every x."""
        return self._errors(output, batch).sum()

    def score(self, output: Tensor, batch: Batch) -> tuple[float, int]:
        """Squared errors after `dim` points or more, in units of what saying 0 gives."""
        errors = self._errors(output, batch)[:, self.dim :] / self.dim
        return float(errors.sum()), errors.numel()

    def _errors(self, output: Tensor, batch: Batch) -> Tensor:
        return (output[:, ::2, 0].float() - batch["targets"]).square()
