"""Absolute positions added to the inputs: learned vectors, or sines and cosines.

    learned:     x_t + E[t]
    sinusoidal:  x_t + PE(t),  PE(t)[2i] = sin(t / 10000^(2i/d)),  PE(t)[2i+1] = cos(t / 10000^(2i/d))

Source: "Attention Is All You Need".
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from attlas.options import option
from attlas.positions.base import Position, as_float, even


class Learned(Position):
    """A trained vector for each of `length` positions, normal with standard deviation 0.02."""

    dim: int = option("width of the inputs", at_least=1, kw_only=False)
    length: int = option("positions that have a vector", default=2048, at_least=1, kw_only=False)

    def setup(self) -> None:
        """Draw the vectors."""
        super().setup()
        self.weight = nn.Parameter(torch.randn(self.length, self.dim) * 0.02)

    def embed(
        self, x: Float[Tensor, "batch tokens dim"], positions: Integer[Tensor, "*batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Add the vectors of `positions`.

        Raises:
            ValueError: a position beyond the trained length.
        """
        if positions.numel() and int(positions.max()) >= len(self.weight):
            raise ValueError(
                f"positions reach {int(positions.max())}, but only {len(self.weight)} are learned"
            )
        return x + self.weight[positions].to(x.dtype)


class Sinusoidal(Position):
    """Sines and cosines of geometrically spaced wavelengths from 2π to base · 2π tokens."""

    dim: int = option("width of the inputs, even", at_least=1, kw_only=False)
    base: float = option(
        "the longest wavelength, in 2π tokens", default=10000.0, above=0, kw_only=False
    )

    def setup(self) -> None:
        """Make the frequencies."""
        super().setup()
        self.frequencies: Tensor
        steps, dim = range(0, even("dim", self.dim), 2), self.dim
        self.hold("frequencies", lambda: self.base ** -(torch.tensor(steps) / dim).float())

    def embed(
        self, x: Float[Tensor, "batch tokens dim"], positions: Integer[Tensor, "*batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Add the sines (even channels) and cosines (odd channels) of `positions`."""
        angles = as_float(positions)[..., None] * self.frequencies.float().to(positions.device)
        return x + torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(x.dtype)
