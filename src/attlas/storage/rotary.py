"""A model's own rotary embedding, for policies that un-rotate or re-rotate.

    rotate(x, t) = x · cos(tθ) + half(x) · sin(tθ),   half([a, b]) = [−b, a]

on the first 2·len(θ) channels, where cos and sin come from the model's module (scaled as YaRN and
others scale them). Rotating is linear, so the mean rotation over many positions is the rotation by
the means of cos and sin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.errors import UserError

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rotary:
    """Rotation by position.

    Attributes:
        angles: gives (cos, sin) [batch, tokens, rotated channels] of positions [batch, tokens].
    """

    angles: Callable[[Tensor], Angles]

    @classmethod
    def plain(cls, dim: int, theta: float = 10000.0) -> Rotary:
        """The original rotary embedding over `dim` channels."""
        inverse = theta ** (-torch.arange(0, dim, 2).float() / dim)

        def angles(positions: Tensor) -> Angles:
            rotated = positions[..., None].float() * inverse.to(positions.device)
            both = torch.cat([rotated, rotated], dim=-1)
            return both.cos(), both.sin()

        return cls(angles)

    @classmethod
    def of(cls, model: nn.Module, layer: int) -> Rotary | None:
        """The rotary embedding that `model` uses in a layer, None when it has none.

        Raises:
            ValueError: it rotates in another way than by halves.
        """
        module = next((m for m in model.modules() if _frequencies(m)), None)
        if module is None:
            return None
        kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)  # type: ignore[union-attr, operator]
        per_kind = not isinstance(getattr(module, "inv_freq", None), Tensor)
        extra = (kinds[layer],) if per_kind and kinds else ()
        sample = torch.zeros(1, dtype=torch.float32, device=_device(module))

        def angles(positions: Tensor) -> Angles:
            cos, sin = module(sample, positions, *extra)
            return cos, sin

        def doubled(positions: Tensor) -> Angles:  # some modules give one half of equal ones
            cos, sin = angles(positions)
            return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

        own: Any = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        for rotary in (cls(angles), cls(doubled)):
            if own is not None and rotary._turns_like(own, angles, _device(module)):
                return rotary
        raise UserError(
            f"{type(model).__name__} does not rotate its keys by halves (but interleaved, or over "
            "several axes), which this policy's rotations need"
        )

    def _turns_like(
        self, own: Any, angles: Callable[[Tensor], Angles], device: torch.device
    ) -> bool:
        """Whether the function that stands beside the model's module does what `rotate` does."""
        positions = torch.arange(3, device=device)[None]
        width = self.angles(positions)[0].shape[-1]
        x = torch.randn(1, 1, 3, width, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            theirs: Tensor = own(x, x, *angles(positions))[0]
        except (RuntimeError, TypeError, ValueError):  # it takes other shapes or arguments
            return False
        return theirs.shape == x.shape and torch.allclose(
            theirs, self.rotate(x, positions), atol=1e-5
        )

    def rotate(
        self, x: Float[Tensor, "batch heads tokens dim"], positions: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """x rotated to positions."""
        cos, sin = self.angles(positions)
        return rotate(x, cos[:, None], sin[:, None])

    def unrotate(
        self, x: Float[Tensor, "batch heads tokens dim"], positions: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """x as it was before it was rotated to positions, in single precision at least."""
        exact = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (angle[:, None].to(exact) for angle in self.back(positions))
        return rotate(x.to(exact), cos, sin)

    def back(self, positions: Int[Tensor, "batch tokens"]) -> Angles:
        """The angles that undo the rotation to positions."""
        cos, sin = self.angles(positions)
        squared = cos.square() + sin.square()  # 1, or the square of YaRN's factor
        return cos / squared, -sin / squared


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


def _frequencies(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


def _device(module: nn.Module) -> torch.device:
    return next(module.buffers()).device
