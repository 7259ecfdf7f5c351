"""Keys and values as coordinates in a few directions that their layer's keys and values lie along.

    k_low = Uᵀ R(−t) k      v_low = Wᵀ v      read back as      k ≈ R(t) U k_low      v ≈ W v_low

U [dim, k_rank] and W [v_dim, v_rank] have orthonormal columns. Where the model rotates its keys they
are rotated back to position 0 first, since rotation spreads the few directions over the circle; so the
position of every token is held beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.errors import UserError
from attlas.ops.reference import taken
from attlas.ops.segments import Block, listed, within
from attlas.storage.body import Body, GrownBody
from attlas.storage.rotary import Rotary


@dataclass(frozen=True)
class Bases:
    """The directions of one layer. They are the part's, as weights are a model's, not a cache's.

    Attributes:
        k: of keys; one head's when all heads share them.
        v: of values, likewise.
        rotary: how the model rotates its keys; None when it does not.
    """

    k: Float[Tensor, "k_heads dim k_rank"]
    v: Float[Tensor, "v_heads v_dim v_rank"]
    rotary: Rotary | None = None

    def encode(
        self,
        k: Float[Tensor, "batch kv_heads tokens dim"],
        v: Float[Tensor, "batch kv_heads tokens v_dim"],
        positions: Int[Tensor, "batch p_heads tokens"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch kv_heads tokens k_rank"], Float[Tensor, "batch kv_heads tokens v_rank"]
    ]:
        """Coordinates of keys, as cached, and values."""
        back = wide(k)
        if self.rotary is not None:
            assert positions is not None
            back = rotated(back, self.rotary, positions, back=True)
        return (back @ self.k.to(back.dtype)).to(k.dtype), (wide(v) @ self.v.to(back.dtype)).to(
            v.dtype
        )

    def decode(
        self,
        k: Float[Tensor, "batch kv_heads tokens k_rank"],
        v: Float[Tensor, "batch kv_heads tokens v_rank"],
        positions: Int[Tensor, "batch p_heads tokens"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch kv_heads tokens dim"], Float[Tensor, "batch kv_heads tokens v_dim"]
    ]:
        """Keys, rotated to their positions, and values, in at least single precision."""
        keys = wide(k) @ self.k.to(wide(k).dtype).mT
        if self.rotary is not None:
            assert positions is not None
            keys = rotated(keys, self.rotary, positions)
        return keys, wide(v) @ self.v.to(keys.dtype).mT

    def of_heads(self, heads: int) -> Bases:
        """The same for so many heads, each of which stands for an equal share of them."""
        k, v = (
            b if b.shape[0] in (1, heads) else b.repeat_interleave(heads // b.shape[0], dim=0)
            for b in (self.k, self.v)
        )
        return replace(self, k=k, v=v)

    @property
    def nbytes(self) -> int:
        """Bytes of the directions."""
        return sum(b.nbytes for b in (self.k, self.v))

    @cached_property
    def digest(self) -> str:
        """What tells them from others."""
        numbers = torch.cat([b.float().flatten() for b in (self.k, self.v)]).cpu().numpy()
        shapes = f"{tuple(self.k.shape)} {tuple(self.v.shape)}".encode()
        return hashlib.sha256(shapes + numbers.tobytes()).hexdigest()[:16]


def wide(x: Tensor) -> Tensor:
    """x in at least single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotated(
    x: Float[Tensor, "batch heads tokens dim"],
    rotary: Rotary,
    positions: Int[Tensor, "batch p_heads tokens"],
    *,
    back: bool = False,
) -> Float[Tensor, "batch heads tokens dim"]:
    """x rotated to positions, or `back` from them, in the precision of x so that one undoes the other."""
    at = positions.flatten(0, 1).long()
    angles = rotary.back(at) if back else rotary.angles(at)
    cos, sin = (a.to(x.dtype).unflatten(0, positions.shape[:2]) for a in angles)
    return rotary.turn(x, cos, sin)


class LowRankBody(GrownBody):
    """Coordinates of keys and values. What its bytes leave out are the bases, which all caches share.

    Args:
        k: of the keys.
        v: of the values.
        bases: in which they are; None for a body out of a file, until `use` gives them.
        positions: of the tokens, as the model counted them; one head's when all heads hold the same
            tokens, None when the keys are not rotated.
        index: original positions, −1 behind the last of a shorter row; None for `first` and on.
        first: column of slot 0 where there is no index.
        digest: of the bases, where they are not given.
    """

    kind = "low-rank"

    def __init__(
        self,
        k: Float[Tensor, "batch kv_heads slots k_rank"],
        v: Float[Tensor, "batch kv_heads slots v_rank"],
        bases: Bases | None,
        positions: Int[Tensor, "batch p_heads slots"] | None = None,
        index: Int[Tensor, "batch kv_heads slots"] | None = None,
        first: int = 0,
        *,
        digest: str = "",
    ) -> None:
        held = {"k": k, "v": v}
        if positions is not None:
            held["positions"] = positions.to(torch.int32)[..., None]
        super().__init__(held, index, first)
        self._bases, self._digest = bases, digest

    @property
    def slots(self) -> int:
        """Tokens of the longest row."""
        return self.held["k"].tensor.shape[2]

    @property
    def bases(self) -> Bases:
        """In which the coordinates are.

        Raises:
            ValueError: the body came out of a file and was given none.
        """
        if self._bases is None:
            raise UserError(
                "this cache holds coordinates in bases that the part knows which made them; go on "
                "inside attach(model, part)"
            )
        return self._bases

    def use(self, bases: Bases) -> None:
        """Go on with bases that are known to be the same.

        Raises:
            ValueError: they are others.
        """
        known = self._digest if self._bases is None else self._bases.digest
        if known != bases.digest:
            raise UserError(
                "this cache holds coordinates in other bases than the part's: it was made by another "
                "calibration or with other ranks"
            )
        self._bases = bases

    @property
    def positions(self) -> Int[Tensor, "batch p_heads slots"] | None:
        """Of the tokens; None when the keys are not rotated."""
        return self.held["positions"].tensor[..., 0] if "positions" in self.held else None

    def alike(self, other: Body) -> bool:
        """Whether the other's coordinates are in the same bases, with positions by the same heads."""
        if not isinstance(other, LowRankBody) or not super().alike(other):
            return False
        ours, theirs = self.bases, other.bases
        same = (ours.k is theirs.k and ours.v is theirs.v) or ours.digest == theirs.digest
        heads = [
            b.held["positions"].tensor.shape[1] for b in (self, other) if "positions" in b.held
        ]
        return same and len(set(heads)) < 2

    def segment(self, index: Tensor | None = None, page: int = 1) -> LowRank:
        """All slots, or the listed pages."""
        k, v = self.held["k"].tensor, self.held["v"].tensor
        return LowRank(self.bases, k, v, self.positions, self.lengths, index, page)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as numbers."""
        return self.bases.decode(self.held["k"].tensor, self.held["v"].tensor, self.positions)

    @property
    def constants(self) -> dict[str, Any]:
        """What tells the bases from others."""
        digest = self._digest if self._bases is None else self._bases.digest
        return {"first": self.first, "bases": digest}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], constants: dict[str, Any]) -> LowRankBody:
        """The body of these tensors, which `use` gives its bases."""
        positions = tensors["positions"][..., 0] if "positions" in tensors else None
        return cls(
            tensors["k"], tensors["v"], None, positions, tensors.get("index"), constants["first"],
            digest=constants["bases"],
        )  # fmt: skip

    def rows(self, change: Callable[[Tensor], Tensor]) -> LowRankBody:
        """The body with its rows in another order, some of them or repeated."""
        other = self.restored({n: change(t) for n, t in self.tensors.items()}, self.constants)
        other._bases = self._bases
        return other

    def fork(self) -> LowRankBody:
        """A body that may grow while this one stays."""
        return self.rows(lambda x: x)


@dataclass(frozen=True)
class LowRank:
    """A segment of coordinates, turned to keys and values run by run.

    Attributes:
        bases: in which they are.
        k: of the keys.
        v: of the values.
        positions: of the tokens; None when the keys are not rotated.
        lengths: valid slots of each row and head, the first ones; None for all.
        index: numbers of the pages to be read, −1 for none; None for all slots.
        page: slots of a page.
    """

    bases: Bases
    k: Float[Tensor, "batch kv_heads slots k_rank"]
    v: Float[Tensor, "batch kv_heads slots v_rank"]
    positions: Int[Tensor, "batch p_heads slots"] | None = None
    lengths: Int[Tensor, "batch kv_heads"] | None = None
    index: Int[Tensor, "batch list_heads pages"] | None = None
    page: int = 1

    @property
    def nbytes(self) -> int:
        """Coordinates, positions and bases; of a list, its share of the first two."""
        held = [self.k, self.v] + ([] if self.positions is None else [self.positions])
        bytes_held = sum(t.nbytes for t in held)
        if self.index is None:
            return bytes_held + self.bases.nbytes
        listed_slots = self.index.shape[1] * self.index.shape[2] * self.page
        share = listed_slots / max(1, self.k.shape[1] * self.k.shape[2])
        own = self.index.nbytes
        return int(bytes_held * share) + own + self.bases.nbytes

    def blocks(self, queries: int, size: int) -> Iterator[Block]:
        """Runs of slots, or of listed slots."""
        if self.index is not None:
            bases = self.bases.of_heads(self.index.shape[1])
            for index in self.index.split(max(1, size // self.page), dim=-1):
                at, seen = listed(index, self.page, self.k.shape[2], self.lengths)
                where = None
                if self.positions is not None:
                    where = taken(self.positions[..., None], at)[..., 0]
                yield *bases.decode(taken(self.k, at), taken(self.v, at), where), seen, None
            return
        for start in range(0, self.k.shape[2], size):
            stop = min(start + size, self.k.shape[2])
            run = slice(start, stop)
            where = None if self.positions is None else self.positions[:, :, run]
            k, v = self.bases.decode(self.k[:, :, run], self.v[:, :, run], where)
            yield k, v, within(torch.arange(start, stop, device=k.device), self.lengths), None
