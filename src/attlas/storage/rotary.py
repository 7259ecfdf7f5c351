"""Rotary embedding as a model really used it, for policies that un-rotate or re-rotate.

    rotate(x, t) = x · cos(tθ) · s + half(x) · sin(tθ) · s,   half([a, b]) = [−b, a]

on 2·len(θ) of the channels: the first or the last, by halves or in neighbouring pairs. Frequencies θ
and the scale s (YaRN's and others') are read from the model's module; the module itself is never called,
since some change their frequencies with the positions that they are called with. Rotating is linear, so
the mean rotation over many positions is the rotation by the means of cos and sin.

How a model rotates each layer's keys is found out by `attlas.cache.rotations`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotation by position, with the frequencies of one call of the model.

    Attributes:
        inverse: frequencies θ, single precision.
        scale: s.
        order: channels of which the first half of 2·len(θ) is rotated with the second; None where the
            channels stand in this order.
    """

    inverse: Float[Tensor, " pairs"]
    scale: float = 1.0
    order: Int[Tensor, " dim"] | None = None

    @classmethod
    def plain(cls, dim: int, theta: float = 10000.0) -> Rotary:
        """The original rotary embedding over `dim` channels."""
        return cls(theta ** (-torch.arange(0, dim, 2).float() / dim))

    def angles(self, positions: Int[Tensor, "batch tokens"]) -> Angles:
        """(cos, sin) [batch, tokens, rotated channels], scaled."""
        turned = positions[..., None].float() * self.inverse.to(positions.device)
        both = torch.cat([turned, turned], dim=-1)
        return both.cos() * self.scale, both.sin() * self.scale

    def turn(
        self,
        x: Float[Tensor, "*rows dim"],
        cos: Float[Tensor, "*#rows turned"],
        sin: Float[Tensor, "*#rows turned"],
    ) -> Float[Tensor, "*rows dim"]:
        """x rotated by angles, in whichever order its channels stand."""
        if self.order is None:
            return rotate(x, cos, sin)
        order = self.order.to(x.device)
        return rotate(x[..., order], cos, sin)[..., order.argsort()]

    def rotate(
        self, x: Float[Tensor, "batch heads tokens dim"], positions: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """x rotated to positions."""
        cos, sin = self.angles(positions)
        return self.turn(x, cos[:, None], sin[:, None])

    def unrotate(
        self, x: Float[Tensor, "batch heads tokens dim"], positions: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """x as it was before it was rotated to positions, in single precision at least."""
        exact = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (angle[:, None].to(exact) for angle in self.back(positions))
        return self.turn(x.to(exact), cos, sin)

    def back(self, positions: Int[Tensor, "batch tokens"]) -> Angles:
        """The angles that undo the rotation to positions."""
        cos, sin = self.angles(positions)
        return cos / self.scale**2, -sin / self.scale**2


@dataclass(frozen=True, eq=False)
class Rotation:
    """Where the frequencies of a layer's rotation stand in its model, which may change them call by call.

    Attributes:
        module: of the model.
        frequencies: the module's buffer of inverse frequencies.
        scale: its attribute of the scale.
        order: of the channels, see `Rotary`.
        varies: the model changes the frequencies with the length of what it reads.
    """

    module: nn.Module
    frequencies: str
    scale: str
    order: Int[Tensor, " dim"] | None = None
    varies: bool = False
    _last: list[Any] = field(default_factory=list)

    def now(self) -> Rotary:
        """With the frequencies that the model used last, the same object for as long as it keeps them."""
        held: Tensor = getattr(self.module, self.frequencies)
        scale = float(getattr(self.module, self.scale, 1.0))
        if self._last:
            source, kept = self._last
            same = held is source and kept.scale == scale
            if same and (not self.varies or torch.equal(held.float(), kept.inverse)):
                return kept  # type: ignore[no-any-return]
        # A copy where they vary: some models write new ones over the old.
        inverse = held.detach().float().clone() if self.varies else held.detach().float()
        self._last[:] = held, Rotary(inverse, scale, self.order)
        return self._last[1]  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotation:
        return self  # a copy of a cache belongs to the same model


def rotate(
    x: Float[Tensor, "*rows dim"],
    cos: Float[Tensor, "*#rows turned"],
    sin: Float[Tensor, "*#rows turned"],
) -> Float[Tensor, "*rows dim"]:
    """x · cos + half(x) · sin on the first channels; the others stay."""
    width = cos.shape[-1]
    moved, rest = x[..., :width], x[..., width:]
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (t.chunk(2, dim=-1) for t in (moved, cos, sin))
    front = torch.addcmul(a * cos_a, b, sin_a, value=-1)
    back = torch.addcmul(b * cos_b, a, sin_b)
    return torch.cat([front, back, rest], dim=-1)


def changing_with_length(base: nn.Module) -> str | None:
    """The kind of rotations that change with the length of a text; None where there are none."""
    told = [getattr(module, "rope_type", None) for module in base.modules()]
    kinds = [kind for each in told for kind in (each.values() if isinstance(each, dict) else (each,))]
    return next((kind for kind in kinds if kind in ("dynamic", "longrope")), None)
