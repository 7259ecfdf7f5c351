"""What a position encoding may do, and the layer that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from attlas.catalog.kinds import POSITION, Kind
from attlas.network import Network
from attlas.options import Configured

#: FlexAttention's pointwise change of scores: (score, b, h, q_idx, kv_idx) -> score.
ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

F = TypeVar("F", bound=Callable[..., Tensor])


def additive(score_mod: F) -> F:
    """Mark a score_mod that only adds a bias, so that SDPA can take it as a mask of numbers."""
    score_mod.additive = True  # type: ignore[attr-defined]
    return score_mod


def placeless(score_mod: F) -> F:
    """Mark a score_mod that reads no positions."""
    score_mod.placeless = True  # type: ignore[attr-defined]
    return score_mod


@lru_cache(maxsize=128)
def by_groups(score_mod: ScoreMod, size: int) -> ScoreMod:
    """A score_mod made for groups of heads, on the heads: head h takes that of group h // size.

    Kept for the next call, since FlexAttention compiles anew for each new function object.
    """

    def grouped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h // size, q_idx, kv_idx)

    return additive(grouped) if getattr(score_mod, "additive", False) else grouped


class Positioned:
    """A score_mod made for positions, on the slots of queries and keys that stand at `at` and `of`.

    The last query lies in the last slot. It is of one call, so that nothing may be compiled for it.
    """

    of_call = True

    def __init__(self, changed: ScoreMod, at: Tensor, of: Tensor) -> None:
        self.changed, self.at, self.of = changed, at, of
        self.first = of.shape[-1] - at.shape[-1]
        self.additive = getattr(changed, "additive", False)

    def __call__(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The change, by where the slots stand."""
        at, of = _told(self.at, b, q_idx - self.first), _told(self.of, b, kv_idx)
        return self.changed(score, b, h, at, of)


def _told(places: Tensor, b: Tensor, slot: Tensor) -> Tensor:
    rows = places.reshape(-1, places.shape[-1])
    return rows[b if len(rows) > 1 else 0, slot]


class Position(Configured, Network):
    """A position encoding. Subclasses override the one hook where theirs enters.

    `embed` adds to the inputs, `rotate` rotates queries and keys, `score_mod` changes the scores.
    """

    kind: ClassVar[Kind] = POSITION

    def embed(
        self, x: Float[Tensor, "batch tokens dim"], positions: Integer[Tensor, "*batch tokens"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """The inputs with their positions added."""
        return x

    def rotate(
        self,
        x: Float[Tensor, "batch heads tokens dim"],
        positions: Integer[Tensor, "*batch tokens"],
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Queries or keys rotated by their positions."""
        return x

    def rotate_both(
        self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys rotated by theirs, for what has work in common where these are one tensor."""
        return self.rotate(q, q_at), self.rotate(k, k_at)

    @property
    def score_mod(self) -> ScoreMod | None:
        """Pointwise change of the scores, None for no change; a subclass has a method of that name."""
        return None


def even(name: str, width: int) -> int:
    """`width` if it is even.

    Raises:
        ValueError: otherwise, naming the argument.
    """
    if width % 2:
        raise ValueError(f"{name} must be even, got {width}")
    return width


def relative(q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Key position minus query position."""
    return kv_idx - q_idx


def as_float(positions: Tensor) -> Tensor:
    """Positions in float32, exact to 16 million tokens."""
    return positions.to(torch.float32)
