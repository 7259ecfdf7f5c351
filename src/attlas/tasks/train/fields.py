"""What operator learning shares: smooth random functions and the relative error of a field."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Generator, Tensor

from attlas.tasks.train.base import Batch, Score, Task

#: Pairs of fields that are solved for training and for the test.
TRAINED, TESTED = 512, 64


class FieldTask(Task):
    """A field in, a field out; trained and scored by the mean relative L² error, floor 0.

    Batches hold `inputs` [rows, points, numbers], the field and the coordinates of its points, and
    `targets` [rows, points].
    """

    judged: ClassVar[Score] = Score("relative L2 error %", "lower", 100.0, 2)
    best: ClassVar[float | None] = 0.0
    yardstick: ClassVar[str] = "0 is the solver's own field; 100 %: says 0 everywhere"

    def terms(self, batch: Batch) -> int:
        """Rows."""
        return len(batch["targets"])

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Sum over the rows of ‖output − target‖ / ‖target‖."""
        wanted = batch["targets"]
        error = torch.linalg.vector_norm(output[..., 0].float() - wanted, dim=-1)
        loss: Tensor = (error / torch.linalg.vector_norm(wanted, dim=-1)).sum()
        return loss

    def score(self, output: Tensor, batch: Batch) -> tuple[float, int]:
        """The loss itself: errors relative to their functions, summed over rows."""
        return float(self.loss(output, batch)), self.terms(batch)


def random_field(
    rng: Generator, rows: int, shape: tuple[int, ...], tau: float, alpha: float
) -> Tensor:
    """Periodic Gaussian random fields on the unit cube, of unit variance and mean 0.

    Their covariance is proportional to (−Δ + τ²)^−α, so that amplitudes fall as (4π²k² + τ²)^(−α/2).
    """
    noise = torch.randn(rows, *shape, generator=rng, dtype=torch.float64)
    axes = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in shape]
    squares = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)
    amplitude = (4 * math.pi**2 * squares + tau**2) ** (-alpha / 2)
    amplitude.view(-1)[0] = 0.0
    amplitude = amplitude * (amplitude.numel() / amplitude.square().sum()).sqrt()
    dims = tuple(range(1, 1 + len(shape)))
    field: Tensor = torch.fft.ifftn(torch.fft.fftn(noise, dim=dims) * amplitude, dim=dims).real
    return field
