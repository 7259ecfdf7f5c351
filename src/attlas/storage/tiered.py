"""Two tiers: all keys and values in host memory, and on the device the few that were read last.

A list of slots is looked up in the device tier: what is there is a hit; what is missing is fetched from
host memory and takes the place of what was not listed for the longest time. Attention then reads the
device tier alone, so only misses are moved, and the device holds a fixed number of tokens a head
however long the context.

Host memory is pinned where the device is a GPU; on a CPU both tiers are ordinary memory, and everything
else is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.errors import UserError
from attlas.ops.segments import Dense, Listed, listed
from attlas.storage.body import Body, GrownBody
from attlas.storage.growing import Growing


@dataclass
class Tier:
    """What is on the device, and in host memory the books of it.

    Attributes:
        k: keys on the device.
        v: values on the device.
        place: where in the tier each slot of the body is, −1 for nowhere.
        slot: which slot lies at each place, −1 for none.
        used: when it was last listed.
    """

    k: Float[Tensor, "batch list_heads capacity dim"]
    v: Float[Tensor, "batch list_heads capacity v_dim"]
    place: Growing
    slot: Int[Tensor, "batch list_heads capacity"]
    used: Int[Tensor, "batch list_heads capacity"]

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, heads: int, capacity: int, device: torch.device) -> Tier:
        """Nothing yet: zeros, so that places never filled are numbers."""
        batch, _, slots, _ = k.shape
        books = torch.full((batch, heads, capacity), -1)
        return cls(
            k.new_zeros(batch, heads, capacity, k.shape[-1], device=device),
            v.new_zeros(batch, heads, capacity, v.shape[-1], device=device),
            Growing(torch.full((batch, heads, slots, 1), -1, dtype=torch.int32)),
            books, books.clone(),
        )  # fmt: skip

    def changed(self, change: Callable[[Tensor], Tensor]) -> Tier:
        """The same for the rows that `change` gives."""
        k, v, slot, used = (change(x).clone() for x in (self.k, self.v, self.slot, self.used))
        return Tier(k, v, Growing(change(self.place.tensor).clone()), slot, used)

    def wider(self, capacity: int) -> Tier:
        """With room for more, what is there kept."""
        more = capacity - self.slot.shape[-1]
        k, v = (
            torch.cat([x, x.new_zeros(*x.shape[:2], more, x.shape[3])], 2) for x in (self.k, self.v)
        )
        slot, used = (
            torch.cat([x, x.new_full((*x.shape[:2], more), -1)], -1) for x in (self.slot, self.used)
        )
        return Tier(k, v, self.place, slot, used)


class TieredBody(GrownBody):
    """Keys and values in host memory, and on the device those that were listed last.

    Args:
        k: keys, on the device that attends or in host memory.
        v: values.
        index: original positions, −1 behind the last of a shorter row; None for `first` and on.
        first: column of slot 0 where there is no index.
        device: which attends; that of the keys unless given.
        capacity: tokens of a head on the device; as many as the longest list unless given.

    Attributes:
        hits: listed tokens of all heads that were on the device.
        misses: listed tokens that were fetched.
        moved: bytes of keys and values that came from host memory, fetched or read whole.

    Raises:
        ValueError: a list longer than the capacity.
    """

    kind = "tiered"

    def __init__(
        self,
        k: Float[Tensor, "batch kv_heads slots dim"],
        v: Float[Tensor, "batch kv_heads slots v_dim"],
        index: Int[Tensor, "batch kv_heads slots"] | None = None,
        first: int = 0,
        *,
        device: torch.device | None = None,
        capacity: int | None = None,
    ) -> None:
        self.device = device or k.device
        held = {"k": _hosted(k, self.device), "v": _hosted(v, self.device)}
        super().__init__(held, None if index is None else index.cpu(), first)
        self.capacity = capacity
        self.tier: Tier | None = None
        self.hits = self.misses = self.moved = self.clock = 0
        self._asked: tuple[Tensor, int] | None = None
        self._given: Listed | None = None

    @property
    def slots(self) -> int:
        """Tokens of the longest row."""
        return self.held["k"].tensor.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return 0 if self.tier is None else self.tier.k.nbytes + self.tier.v.nbytes

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory: keys, values, columns and the books of the tier."""
        books = 0
        if self.tier is not None:
            books = self.tier.place.nbytes + self.tier.slot.nbytes + self.tier.used.nbytes
        return super().nbytes + books

    def original_positions(self, batch: int, heads: int, device: torch.device) -> Tensor:
        """Original positions of every slot, on the device asked for."""
        return super().original_positions(batch, heads, device).to(device)

    def keys(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "b h slots dim"]:
        """Some slots' keys, on the device."""
        return self.held["k"].tensor[:, :, start:stop].to(self.device)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, on the device for as long as they are needed."""
        k, v = (self.held[name].tensor.to(self.device) for name in ("k", "v"))
        self.moved += k.nbytes + v.nbytes
        return k, v

    def segment(self, index: Tensor | None = None, page: int = 1) -> Dense | Listed:
        """All slots, or the device tier once it holds the listed pages.

        The same list once more is no new request: it is neither counted nor looked up.
        """
        if index is None:
            lengths = None if self.lengths is None else self.lengths.to(self.device)
            return Dense(*self.read(), lengths)
        known = self._asked is not None and self._asked[0] is index and self._asked[1] == page
        if self._given is None or not known:
            self._given = self._fetched(index, page)
            self._asked = index, page
        return self._given

    def _fetched(self, index: Tensor, page: int) -> Listed:
        """Look the list up, move what is missing, and say where in the tier all of it is."""
        lengths = None if self.lengths is None else self.lengths.cpu()
        at, there = listed(index.cpu().long(), page, self.slots, lengths)
        at, there = at.long(), there[:, :, 0]
        tier = self._room_for(at.shape[1], int(there.sum(-1).max()))
        self.clock += 1
        place = tier.place.tensor[..., 0].gather(-1, at).long().masked_fill(~there, -1)
        found, missing = place >= 0, there & (place < 0)
        _mark(tier.used, place, found, self.clock)
        # The places longest unused go first; those listed now were just marked and go last.
        free = tier.used.argsort(dim=-1, stable=True)
        rank = (missing.cumsum(dim=-1) - 1).clamp(min=0)
        place = torch.where(missing, free.gather(-1, rank.clamp(max=free.shape[-1] - 1)), place)
        self._move(tier, at, place, missing)
        _mark(tier.used, place, missing, self.clock)
        self.hits += int(found.sum())
        return Listed(tier.k, tier.v, place.to(self.device, torch.int32))

    def _move(self, tier: Tier, at: Tensor, place: Tensor, missing: Tensor) -> None:
        """Copy the missing tokens from host memory into their places, and keep the books."""
        row, head, entry = missing.nonzero(as_tuple=True)
        if not len(row):
            return
        slot, to = at[row, head, entry], place[row, head, entry]
        gone = tier.slot[row, head, to]
        held = gone >= 0
        tier.place.tensor[row[held], head[held], gone[held]] = -1
        tier.place.tensor[row, head, slot] = to[:, None].to(torch.int32)
        tier.slot[row, head, to] = slot
        where = [x.to(self.device) for x in (row, head, to)]
        of = head // (at.shape[1] // self.held["k"].tensor.shape[1])
        for name, device_side in (("k", tier.k), ("v", tier.v)):
            part = self.held[name].tensor[row, of, slot]
            if self.device.type == "cuda":
                part = part.pin_memory()
            device_side[where[0], where[1], where[2]] = part.to(self.device, non_blocking=True)
            self.moved += part.nbytes
        self.misses += len(row)

    def _room_for(self, heads: int, tokens: int) -> Tier:
        """The tier, with room for so many tokens of so many heads and a place for every slot."""
        if self.capacity is not None and tokens > self.capacity:
            raise UserError(
                f"capacity={self.capacity} tokens on the device cannot hold the {tokens} that a step "
                "reads; give a larger capacity or read fewer"
            )
        tier, capacity = self.tier, self.capacity or max(1, tokens)
        if tier is None or tier.slot.shape[1] != heads:
            k, v = (self.held[name].tensor for name in ("k", "v"))
            tier = Tier.empty(k, v, heads, capacity, self.device)
        elif tier.slot.shape[-1] < capacity:
            tier = tier.wider(capacity)
        if (new := self.slots - tier.place.tensor.shape[2]) > 0:
            tier.place.append(tier.place.tensor.new_full((*tier.slot.shape[:2], new, 1), -1))
        self.tier = tier
        return tier

    def rows(self, change: Callable[[Tensor], Tensor]) -> TieredBody:
        """Other rows, each with what it has on the device."""
        other = self._beside({name: change(t) for name, t in self.tensors.items()})
        other.tier = None if self.tier is None else self.tier.changed(change)
        other.hits, other.misses, other.moved = self.hits, self.misses, self.moved
        other.clock = self.clock
        return other

    def fork(self) -> TieredBody:
        """Shares what is in host memory; on its device is nothing yet."""
        return self._beside(self.tensors)

    def _beside(self, tensors: dict[str, Tensor]) -> TieredBody:
        return TieredBody(
            tensors["k"], tensors["v"], tensors.get("index"), self.first, device=self.device,
            capacity=self.capacity,
        )  # fmt: skip

    @property
    def constants(self) -> dict[str, Any]:
        """First column and capacity."""
        return {"first": self.first, "capacity": self.capacity}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], constants: dict[str, Any]) -> Body:
        """The body of these tensors, for the device on which they are."""
        return cls(
            tensors["k"], tensors["v"], tensors.get("index"), constants["first"],
            capacity=constants["capacity"],
        )  # fmt: skip


def _hosted(x: Tensor, device: torch.device) -> Tensor:
    """x in host memory, pinned where a GPU reads it."""
    if device.type != "cuda":
        return x.cpu()
    if x.device.type == "cpu" and x.is_pinned():
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x)


def _mark(used: Tensor, place: Tensor, which: Tensor, clock: int) -> None:
    """Note that the places which are marked were used now."""
    row, head, entry = which.nonzero(as_tuple=True)
    used[row, head, place[row, head, entry]] = clock
