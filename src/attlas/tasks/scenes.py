"""Pictures of shapes that stand anywhere among specks, and units that respond to one shape.

    picture     brightness_s · shape_s for each shape that is there, over a share of bright specks
    response_u  gain_u · brightness of the unit's shape (0 where it is not there) + noise

All follows from the scene, which follows from the seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

#: Height and width of a picture, and of a shape.
SIZE, SIDE = 32, 6
SPECKS = 0.15
SHAPES = {
    "ring": ("011110", "110011", "100001", "100001", "110011", "011110"),
    "cross": ("100001", "110011", "011110", "011110", "110011", "100001"),
    "bars": ("111111", "111111", "000000", "000000", "111111", "111111"),
    "plus": ("001100", "001100", "111111", "111111", "001100", "001100"),
}


@dataclass(frozen=True)
class Scene:
    """What stands in a picture.

    Attributes:
        shapes: (number of a shape, row and column of its upper left corner, brightness).
        specks: the seed of the specks.
    """

    shapes: tuple[tuple[int, int, int, float], ...]
    specks: int


def scene(rng: random.Random, moving: bool = True) -> Scene:
    """Each shape is there half of the time; `moving` in any quarter, else always at its own place."""
    half = SIZE // 2
    corners, found = rng.sample(range(4), 4) if moving else range(4), []
    for shape, corner in enumerate(corners):
        row, column = divmod(corner, 2)
        down, right = (rng.randint(0, half - SIDE) if moving else (half - SIDE) // 2 for _ in range(2))
        bright = rng.uniform(0.4, 1.0)
        if rng.random() < 0.5:
            found.append((shape, half * row + down, half * column + right, bright))
    return Scene(tuple(found), rng.randrange(2**31))


def picture(seen: Scene) -> Float[Tensor, "size size"]:
    """The picture of a scene, in [0, 1]."""
    rng = torch.Generator().manual_seed(seen.specks)
    drawn = torch.rand(2, SIZE, SIZE, generator=rng)
    pixels = drawn[0] * (drawn[1] < SPECKS)
    stencils = list(SHAPES.values())
    for shape, row, column, bright in seen.shapes:
        stencil = torch.tensor([[float(c) for c in line] for line in stencils[shape]])
        place = pixels[row : row + SIDE, column : column + SIDE]
        place.copy_(torch.where(stencil > 0, bright, place))
    return pixels


def responses(seen: Scene, gains: tuple[tuple[float, ...], ...], noise: float) -> tuple[float, ...]:
    """The responses of all units, those of the first shape first.

    Args:
        seen: the scene.
        gains: of the units of each shape.
        noise: its standard deviation.
    """
    rng = random.Random(f"{seen.specks}/units")
    bright = {shape: brightness for shape, _, _, brightness in seen.shapes}
    return tuple(
        gain * bright.get(shape, 0.0) + rng.gauss(0, noise)
        for shape, units in enumerate(gains)
        for gain in units
    )
