"""Burgers' equation: from the velocity at the beginning to the velocity at time 1.

    u_t + (u²/2)_x = ν u_xx     on a circle of length 1

Beginnings are smooth random functions. The solver is ours: central differences in conservative form
on 128 points, Heun's method with time steps well inside both stability limits, in float64; every
second, fourth, … point is shown. 512 pairs are solved for training, 64 for the test. Scored: the
relative L² error. Floor: 0.
Source: the benchmark of "Choose a Transformer: Fourier or Galerkin" and of the Fourier neural
operator, whose data rest on another solver; errors cannot be compared with theirs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Generator, Tensor

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, integers, task
from attlas.tasks.train.fields import TESTED, TRAINED, FieldTask, random_field

FINE = 128


@task("burgers", needs="operator")
class Burgers(FieldTask):
    """One dimension."""

    points: int = option("points that are shown, a divisor of 128", default=64, at_least=4)
    viscosity: float = option("ν of the equation", default=0.01, at_least=0.005, at_most=1)

    def setup(self) -> None:
        """Refuse points that are not evenly spaced."""
        if FINE % self.points:
            raise ValueError(f"points must be a divisor of {FINE} and 4 or more, got {self.points}")

    @property
    def sizes(self) -> Sizes:
        """The velocity and the place."""
        return Sizes(outputs=1, length=self.points, inputs=2)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Pairs drawn with replacement."""
        before, after = solved(self.viscosity, split)
        chosen = integers(rng, 0, len(before), rows)
        step = FINE // self.points
        shown = before[chosen, ::step]
        place = (torch.arange(self.points) / self.points).expand_as(shown)
        inputs = torch.stack([shown, place], dim=-1)
        return {"inputs": inputs, "targets": after[chosen, ::step]}


@cache
def solved(viscosity: float, split: str) -> tuple[Tensor, Tensor]:
    """Beginnings and ends, the same ones every time."""
    rng = torch.Generator().manual_seed(0 if split == "train" else 1)
    begin = random_field(rng, TRAINED if split == "train" else TESTED, (FINE,), tau=5.0, alpha=2.0)
    return begin.float(), solve(begin, viscosity).float()


def solve(u: Tensor, viscosity: float, time: float = 1.0) -> Tensor:
    """The velocity [rows, points] after `time`."""
    dx = 1 / u.shape[-1]
    limit = min(0.25 * dx**2 / viscosity, 0.4 * dx / float(u.abs().max()))
    steps = int(time / limit) + 1
    dt = time / steps

    def change(u: Tensor) -> Tensor:
        right, left = u.roll(-1, -1), u.roll(1, -1)
        return (viscosity * (right - 2 * u + left) / dx - (right**2 - left**2) / 4) / dx

    for _ in range(steps):
        first = change(u)
        u = u + dt / 2 * (first + change(u + dt * first))
    return u
