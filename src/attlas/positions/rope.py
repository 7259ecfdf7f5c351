"""Rotary position embedding: rotate each pair of channels by an angle that grows with position.

    (q R_t) · (k R_s) depends on t − s alone;   R_t rotates pair i by t · θ_i,   θ_i = base^(−2i/d)

Longer contexts than trained for (s = factor):
    linear   θ_i / s                                     (position interpolation)
    ntk      base · s^(d/(d−2))                          (stretch low frequencies, keep high ones)
    yarn     between both by wavelength, q and k scaled together by 0.1 ln s + 1

Sources: "RoFormer: Enhanced Transformer with Rotary Position Embedding"; "Extending Context Window
of Large Language Models via Positional Interpolation"; "YaRN: Efficient Context Window Extension of
Large Language Models".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from attlas.ops.fused import fused
from attlas.options import option
from attlas.positions.base import Position, even

Scaling = Literal["linear", "ntk", "yarn"]


class RoPE(Position):
    """Rotary positions."""

    head_dim: int = option("width of a head, even", at_least=1, kw_only=False)
    base: float | Sequence[float] = option(
        "of the wavelengths; a sequence gives one for each key head, shared by the query heads of its "
        "group", default=10000.0, above=0, kw_only=False,
    )  # fmt: skip
    scaling: Scaling | None = option(
        "how contexts longer than trained for are read; None leaves the frequencies alone",
        default=None,
    )
    factor: float = option("how many times longer than trained for", default=1.0, at_least=1)
    original_length: int = option(
        "tokens trained for, which YaRN's ramp needs", default=2048, at_least=1
    )
    interleaved: bool = option(
        "pair channels (0, 1), (2, 3), … instead of (i, i + d/2)", default=False
    )

    def setup(self) -> None:
        """Make the frequencies."""
        super().setup()
        self.frequencies: Tensor
        even("head_dim", self.head_dim)
        self.magnitude = 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" else 1.0
        self.hold("frequencies", self._made)  # [pairs] or [kv_heads, pairs]

    def _made(self) -> Tensor:
        """The frequencies that the options tell."""
        width, factor, scaling = self.head_dim, self.factor, self.scaling
        bases = torch.tensor(self.base, dtype=torch.float32)
        if scaling == "ntk":
            bases = bases * factor ** (width / (width - 2))
        # Written as in Transformers: another rounding would show after some hundred tokens.
        steps = torch.arange(0, width, 2, dtype=torch.float32)
        theta = 1.0 / bases[..., None] ** (steps / width)
        if scaling == "linear":
            return theta / factor
        if scaling == "yarn":
            ramp = _yarn_ramp(width, bases, self.original_length)
            return theta * (1 - ramp) + theta / factor * ramp
        return theta

    def rotate(
        self,
        x: Float[Tensor, "batch heads tokens dim"],
        positions: Integer[Tensor, "*batch tokens"],
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Rotate x, whose tokens stand at `positions`."""
        return self._rotated(x, *self.waves(x, positions))

    def rotate_both(
        self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys rotated; by the same waves where they stand at the same positions."""
        shared = q_at is k_at and self.frequencies.ndim == 1 and q.dtype == k.dtype
        waves = self.waves(q, q_at)
        others = waves if shared else self.waves(k, k_at)
        return self._rotated(q, *waves), self._rotated(k, *others)

    @property
    def _rotated(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return _rotated_pairs if self.interleaved else _rotated_halves

    def waves(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [*batch, heads or 1, tokens, pairs] of the angles that rotate x."""
        # In float32, as Transformers does; in float64 for those who check against it.
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = positions[..., None, :, None].to(dtype) * self._per_head(x).to(dtype)
        cos, sin = angles.cos(), angles.sin()
        if self.magnitude != 1.0:
            cos, sin = cos * self.magnitude, sin * self.magnitude
        return cos.to(x.dtype), sin.to(x.dtype)

    def _per_head(self, x: Tensor) -> Tensor:
        """Frequencies [pairs] of all heads of x, or [heads, 1, pairs]."""
        theta = self.frequencies.float().to(x.device)
        if theta.ndim == 1:
            return theta
        if x.shape[1] % len(theta):
            raise ValueError(f"{len(theta)} bases do not divide {x.shape[1]} heads")
        return theta.repeat_interleave(x.shape[1] // len(theta), dim=0)[:, None, :]


@fused
def _rotated_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel i rotated with channel i + d/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@fused
def _rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel 2i rotated with channel 2i + 1."""
    even_half, odd_half = x[..., 0::2], x[..., 1::2]
    rotated = (even_half * cos - odd_half * sin, even_half * sin + odd_half * cos)
    return torch.stack(rotated, dim=-1).flatten(-2)


def _yarn_ramp(
    dim: int, base: Tensor, length: int, fast: float = 32.0, slow: float = 1.0
) -> Tensor:
    """0 for pairs that turn more than `fast` times in `length` tokens, 1 for fewer than `slow`."""

    def pair_turning(turns: float) -> Tensor:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * torch.log(base))

    low = pair_turning(fast).floor().clamp(min=0)[..., None]
    high = pair_turning(slow).ceil().clamp(max=dim - 1)[..., None]
    return ((torch.arange(dim // 2) - low) / (high - low).clamp(min=1e-3)).clamp(0, 1)
