"""What layers over a picture share: its grid, convolutions over it, rotations by row and column."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas.bases.grid import GridConv, grid_of


def test_grid_is_as_given_or_square_or_a_row() -> None:
    assert grid_of(12, (2, 6)) == (2, 6)
    assert grid_of(49) == (7, 7)
    assert grid_of(12) == (1, 12)
    with pytest.raises(ValueError, match="grid"):
        grid_of(12, (3, 3))


def test_grid_conv_sees_neighbours_of_its_own_channel_row_by_row() -> None:
    conv = GridConv(2, 3).double()
    x = torch.zeros(1, 20, 2, dtype=torch.float64)
    x[0, 1 * 5 + 2, 1] = 1.0  # row 1, column 2 of 4 × 5
    with torch.no_grad():
        conv.bias.zero_()
        found = conv(x, (4, 5)).unflatten(1, (4, 5))[0]
    assert (found[..., 0] == 0).all()
    seen = found[..., 1]
    torch.testing.assert_close(seen[0:3, 1:4], conv.weight[1, 0].flip(0, 1).detach())
    assert seen.count_nonzero() == 9


@pytest.mark.parametrize("name", ["mala", "rala", "nalaformer"])
def test_grid_rotation_tells_rows_and_columns_apart(name: str) -> None:
    """Products of rotated features rest on how many rows and columns lie between, on nothing else."""
    layer = attlas.make(name, dim=16, heads=1, grid=(3, 4)).double()
    one, other = torch.rand(2, 16, dtype=torch.float64)
    a, b = (layer.rotated(x.expand(1, 1, 12, -1))[0, 0] for x in (one, other))
    products = (a @ b.T).reshape(3, 4, 3, 4)
    torch.testing.assert_close(products[0, 0, :2, :3], products[1, 1, 1:, 1:])
    torch.testing.assert_close(products[0, 0, 0, 0], one @ other)
    assert (products[0, 0, 1, 0] - products[0, 0, 0, 1]).abs() > 1e-3
    # The first half of the channels by the row, pairs (0, 1), … from 1 to 1/10000 of a turn's radian.
    turn = torch.polar(torch.ones(4).double(), 2 * 10000.0 ** -torch.linspace(0, 1, 4).double())
    by_row = torch.view_as_complex(one[:8].unflatten(0, (4, 2)))
    by_row = torch.view_as_real(by_row * turn).flatten()
    torch.testing.assert_close(a[2 * 4, :8], by_row)
    torch.testing.assert_close(a[2 * 4, 8:], one[8:])


@pytest.mark.parametrize("name", ["mala", "rala", "nalaformer"])
def test_grid_rotation_refuses_heads_that_it_cannot_halve(name: str) -> None:
    with pytest.raises(ValueError, match="head_dim"):
        attlas.make(name, dim=12, heads=2)
    assert attlas.make(name, dim=12, heads=2, rotary=False)(torch.randn(1, 4, 12)).shape == (1, 4, 12)
