"""Darcy flow: from the ground's permeability to the pressure in it.

    −∇·(a ∇p) = 1  on the unit square,  p = 0 at its border

a is 12 or 3, decided by the sign of a smooth random field. The solver is ours: five-point finite
volumes on `points` × `points` cells, harmonic means of a at the faces between them, the border half a
cell away; solved directly in float64. 512 pairs for training, 64 for the test. Scored: the relative
L² error. Floor: 0.
Source: the benchmark of "Choose a Transformer: Fourier or Galerkin" and of the Fourier neural
operator, on a coarser grid; errors cannot be compared with theirs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Generator, Tensor

from attlas.options import option
from attlas.tasks.train.base import Batch, Sizes, integers, task
from attlas.tasks.train.fields import TESTED, TRAINED, FieldTask, random_field

HIGH, LOW = 12.0, 3.0
#: Systems that are solved at once.
CHUNK = 64


@task("darcy", needs="operator")
class Darcy(FieldTask):
    """Two dimensions."""

    points: int = option(
        "cells a side; the model reads the square of it", default=12, at_least=4, at_most=32
    )

    @property
    def sizes(self) -> Sizes:
        """The permeability and two coordinates."""
        return Sizes(outputs=1, length=self.points**2, inputs=3)

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """Pairs drawn with replacement; permeability as ±1, pressure in units of its mean."""
        ground, pressure = solved(self.points, split)
        chosen = integers(rng, 0, len(ground), rows)
        middle = (torch.arange(self.points) + 0.5) / self.points
        place = torch.stack(torch.meshgrid(middle, middle, indexing="ij"), dim=-1).flatten(0, 1)
        shown = torch.where(ground[chosen] == HIGH, 1.0, -1.0).flatten(1)[..., None]
        inputs = torch.cat([shown, place.expand(rows, -1, -1)], dim=-1)
        return {"inputs": inputs, "targets": pressure[chosen].flatten(1)}


@cache
def solved(points: int, split: str) -> tuple[Tensor, Tensor]:
    """Permeabilities and pressures, the same ones every time."""
    rng = torch.Generator().manual_seed(0 if split == "train" else 1)
    field = random_field(rng, TRAINED if split == "train" else TESTED, (points, points), 3.0, 2.0)
    ground = torch.where(field > 0, HIGH, LOW).double()
    pressure = torch.cat([solve(part) for part in ground.split(CHUNK)])
    return ground.float(), (pressure / solved_scale(points)).float()


@cache
def solved_scale(points: int) -> float:
    """The mean pressure of even ground in between, so that targets are of the order of 1."""
    even = torch.full((1, points, points), (HIGH + LOW) / 2, dtype=torch.float64)
    return float(solve(even).mean())


def solve(a: Tensor, source: float = 1.0) -> Tensor:
    """The pressure [rows, n, n] for permeabilities [rows, n, n]."""
    rows, n, _ = a.shape
    number = torch.arange(n * n).view(n, n)
    matrix = torch.zeros(rows, n * n, n * n, dtype=a.dtype)
    for own, other, cells, beside in (
        (a[:, :-1], a[:, 1:], number[:-1], number[1:]),
        (a[..., :-1], a[..., 1:], number[:, :-1], number[:, 1:]),
    ):
        face = (2 * own * other / (own + other)).flatten(1)
        i, j = cells.flatten(), beside.flatten()
        matrix[:, i, j] -= face
        matrix[:, j, i] -= face
        matrix[:, i, i] += face
        matrix[:, j, j] += face
    for edge in (number[0], number[-1], number[:, 0], number[:, -1]):
        matrix[:, edge, edge] += 2 * a.flatten(1)[:, edge]
    given = torch.full((rows, n * n, 1), source / n**2, dtype=a.dtype)
    pressure: Tensor = torch.linalg.solve(matrix, given).view(rows, n, n)
    return pressure
