"""What a position encoding may do, and the layer that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from attlas.catalog.kinds import POSITION, Kind
from attlas.network import Network
from attlas.options import Configured

#: FlexAttention's pointwise change of scores: (score, b, h, q_idx, kv_idx) -> score.
ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
#: What is added to the scores of a head at a distance, key less query position: (h, distance) -> number.
ByDistance: TypeAlias = Callable[[Tensor, Tensor], Tensor]

F = TypeVar("F", bound=Callable[..., Tensor])


def additive(score_mod: F) -> F:
    """Mark a score_mod that only adds a bias, so that SDPA can take it as a mask of numbers."""
    score_mod.additive = True  # type: ignore[attr-defined]
    return score_mod


def placeless(score_mod: F) -> F:
    """Mark a score_mod that reads no positions."""
    score_mod.placeless = True  # type: ignore[attr-defined]
    return score_mod


def of_distance(method: str) -> Callable[[F], F]:
    """Mark a score_mod that adds `self.<method>(h, distance)`, a distance being key less query position.

    There are as many distances as tokens, not as pairs: where something about them is trained, `attend`
    reads them from a table and gathers the table's gradient along diagonals (`attlas.ops.toeplitz`).
    """

    def mark(score_mod: F) -> F:
        score_mod.by_distance = method  # type: ignore[attr-defined]
        return additive(score_mod)

    return mark


def by_distance(score_mod: ScoreMod | None) -> ByDistance | None:
    """What a score_mod adds, if that hangs on head and distance alone; None of any other."""
    marked: str | ByDistance | None = getattr(score_mod, "by_distance", None)
    if not isinstance(marked, str):
        return marked
    bias: ByDistance | None = getattr(getattr(score_mod, "__self__", None), marked, None)
    return bias


def from_table(table: Tensor, offset: int = 0) -> ScoreMod:
    """The score_mod that adds numbers [heads, distances], the distance 0 in the middle; of queries whose
    indices count from `offset`."""

    def biased(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = relative(q_idx + offset, kv_idx)
        return score + table[h, distance + table.shape[1] // 2].to(score.dtype)

    return additive(biased)


@lru_cache(maxsize=128)
def on_heads(score_mod: ScoreMod | None, first: int) -> ScoreMod | None:
    """A score_mod for heads from `first` on: head h takes that of head first + h.

    Kept for the next call, since FlexAttention compiles anew for each new function object.
    """
    if score_mod is None:
        return None

    def later(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h + first, q_idx, kv_idx)

    if (bias := by_distance(score_mod)) is not None:
        later.by_distance = lambda h, distance: bias(h + first, distance)  # type: ignore[attr-defined]
    return additive(later) if getattr(score_mod, "additive", False) else later


def captured(score_mod: ScoreMod | None) -> list[Tensor]:
    """The tensors that a score_mod reads: its module's parameters, or what its closure holds."""
    score_mod = getattr(score_mod, "changed", score_mod)
    owner = getattr(score_mod, "__self__", score_mod)
    if isinstance(owner, nn.Module):
        return list(owner.parameters())
    cells = [cell.cell_contents for cell in getattr(score_mod, "__closure__", None) or ()]
    tensors = [c for c in cells if isinstance(c, Tensor)]
    inner = [c for c in cells if callable(c) and not isinstance(c, Tensor)]
    return tensors + [t for c in inner for t in captured(c)]


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
