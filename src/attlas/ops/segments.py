"""Segments: the ways in which keys and values lie in memory when a few queries attend to them.

A cache is a list of segments, whose order means nothing; `attlas.ops.decode` attends to each and
merges. All of them hold, for every row and key head, slots of which the first `lengths` are valid.

| segment | keys and values                                                      |
|---------|----------------------------------------------------------------------|
| Dense   | [batch, kv_heads, slots, dim], any strides                             |
| Ragged  | [slots, dim], each head's own run of slots at its own offset           |
| Listed  | Dense, of which only listed pages are read; a page of one is a token   |
| Coded   | quantised (`attlas.ops.quantize.Codes`), all or listed pages           |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas.ops.quantize import Codes
from attlas.ops.reference import taken
from attlas.tracing import traced

#: (keys, values, what may be seen, bias) of some slots. The heads of keys divide the query heads; what
#: may be seen is [batch, one head or those of keys or queries, queries or one, slots], None for all;
#: a bias [batch, heads of keys, slots] is added to the scaled scores.
Block = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@runtime_checkable
class Segment(Protocol):
    """What `decode` asks of a segment."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and what goes with them that one step reads."""
        ...

    def blocks(self, queries: int, size: int) -> Iterator[Block]:
        """(keys, values, visible, bias) of successive slots, at most about `size` at once."""
        ...


@dataclass(frozen=True)
class Dense:
    """Slots one behind the other.

    Attributes:
        k: keys.
        v: values; may be of another width.
        lengths: valid slots of each row and head, the first ones; None for all.
        visible: which query may see which slot; None for all.
        causal: the last query stands at the last slot, and none sees later ones.
        bias: added to the scaled scores of a slot.
    """

    k: Float[Tensor, "batch kv_heads slots dim"]
    v: Float[Tensor, "batch kv_heads slots v_dim"]
    lengths: Int[Tensor, "batch kv_heads"] | None = None
    visible: (
        Bool[
            Tensor,
            (
                batch  # heads queries slots
            ),
        ]
        | None
    ) = None
    causal: bool = False
    bias: Float[Tensor, "batch kv_heads slots"] | None = None

    @property
    def nbytes(self) -> int:
        """Keys, values and biases."""
        return self.k.nbytes + self.v.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def blocks(self, queries: int, size: int) -> Iterator[Block]:
        """Runs of slots."""
        slots = self.k.shape[2]
        for start in range(0, slots, size):
            stop = min(start + size, slots)
            at = torch.arange(start, stop, device=self.k.device)
            seen = within(at, self.lengths)
            if self.causal and queries > 1:
                last = torch.arange(slots - queries, slots, device=at.device)
                seen = both(seen, (at <= last[:, None])[None, None])
            if self.visible is not None:
                seen = both(seen, self.visible[..., start:stop])
            bias = None if self.bias is None else self.bias[:, :, start:stop]
            yield self.k[:, :, start:stop], self.v[:, :, start:stop], seen, bias


@dataclass(frozen=True)
class Ragged:
    """A different number of slots for each head, in one flat buffer.

    Attributes:
        k: keys of all rows and heads.
        v: values likewise.
        offsets: first slot of each row and head.
        lengths: how many slots it has.
        longest: the largest of the lengths, known without asking the device.
        bias: added to the scaled scores of a slot.
    """

    k: Float[Tensor, "slots dim"]
    v: Float[Tensor, "slots v_dim"]
    offsets: Int[Tensor, "batch kv_heads"]
    lengths: Int[Tensor, "batch kv_heads"]
    longest: int
    bias: Float[Tensor, " slots"] | None = None

    @property
    def nbytes(self) -> int:
        """Keys, values, biases, offsets and lengths."""
        held = (self.k, self.v, self.bias, self.offsets, self.lengths)
        return sum(t.nbytes for t in held if t is not None)

    def blocks(self, queries: int, size: int) -> Iterator[Block]:
        """Runs of slots, the shorter heads filled up with what is not seen."""
        for start in range(0, self.longest, size):
            stop = min(start + size, self.longest)
            at = torch.arange(start, stop, device=self.k.device)
            seen = within(at, self.lengths)
            assert seen is not None
            where = (self.offsets[..., None] + at).clamp(max=max(0, len(self.k) - 1))
            bias = None if self.bias is None else self.bias[where]
            yield self.k[where], self.v[where], seen, bias


@dataclass(frozen=True)
class Listed:
    """Some pages of slots, chosen for each row and head.

    Attributes:
        k: keys, of which the listed are read.
        v: values.
        index: numbers of the pages, −1 for none; heads are those of the keys or of the queries.
        page: slots of a page; the last page may be short.
        lengths: valid slots of each row and head, the first ones; None for all.
    """

    k: Float[Tensor, "batch kv_heads slots dim"]
    v: Float[Tensor, "batch kv_heads slots v_dim"]
    index: Int[Tensor, "batch list_heads pages"]
    page: int = 1
    lengths: Int[Tensor, "batch kv_heads"] | None = None

    @property
    def nbytes(self) -> int:
        """The listed keys and values, places of the list that hold none included, and the list."""
        width = (self.k.shape[-1] + self.v.shape[-1]) * self.k.element_size()
        return self.index.numel() * self.page * width + self.index.nbytes

    def blocks(self, queries: int, size: int) -> Iterator[Block]:
        """Runs of listed slots, gathered."""
        for index in self.index.split(max(1, size // self.page), dim=-1):
            at, seen = listed(index, self.page, self.k.shape[2], self.lengths)
            yield taken(self.k, at), taken(self.v, at), unless_all(seen), None


@dataclass(frozen=True)
class Coded:
    """Quantised slots, all of them or listed pages.

    Attributes:
        k: keys.
        v: values.
        lengths: valid slots of each row and head, the first ones; None for all.
        index: numbers of the pages to be read, −1 for none; None for all slots.
        page: slots of a page.
    """

    k: Codes
    v: Codes
    lengths: Int[Tensor, "batch kv_heads"] | None = None
    index: Int[Tensor, "batch list_heads pages"] | None = None
    page: int = 1

    @property
    def nbytes(self) -> int:
        """Codes and what goes with them; of a list, its share."""
        held = self.k.nbytes + self.v.nbytes
        if self.index is None:
            return held
        share = self.index.shape[-1] * self.page / max(1, self.k.tokens)
        heads = self.index.shape[1] / self.k.data.shape[1]
        return int(held * share * heads) + self.index.nbytes

    def blocks(self, queries: int, size: int) -> Iterator[Block]:
        """Runs of slots, read as numbers run by run."""
        if self.index is not None:
            for index in self.index.split(max(1, size // self.page), dim=-1):
                at, seen = listed(index, self.page, self.k.tokens, self.lengths)
                yield self.k.gather(at), self.v.gather(at), unless_all(seen), None
            return
        for start in range(0, self.k.tokens, size):
            stop = min(start + size, self.k.tokens)
            at = torch.arange(start, stop, device=self.k.data.device)
            yield self.k.read(start, stop), self.v.read(start, stop), within(at, self.lengths), None


def within(at: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Whether slots `at` are valid, [batch, kv_heads, 1, slots]; None when all are."""
    return None if lengths is None else at < lengths[:, :, None, None]


def both(a: Tensor | None, b: Tensor) -> Tensor:
    """What two masks let through, the first repeated for the heads of the second where it must be."""
    if a is None:
        return b
    if b.shape[1] > a.shape[1] > 1:
        a = a.repeat_interleave(b.shape[1] // a.shape[1], dim=1)
    return a & b


def listed(
    index: Int[Tensor, "batch list_heads pages"], page: int, slots: int, lengths: Tensor | None
) -> tuple[Int[Tensor, "batch list_heads n"], Bool[Tensor, "batch list_heads 1 n"]]:
    """(slots of the listed pages, whether each is there); what is not is slot 0."""
    inside = torch.arange(page, device=index.device)
    at = (index[..., None] * page + inside).flatten(-2)
    there = (index >= 0)[..., None].expand(*index.shape, page).flatten(-2) & (at < slots)
    if lengths is not None:
        each = lengths.repeat_interleave(index.shape[1] // lengths.shape[1], dim=1)
        there = there & (at < each[..., None])
    return torch.where(there, at, 0), there[:, :, None]


def unless_all(seen: Tensor) -> Tensor | None:
    """The mask; None where a CPU finds that it hides nothing, as its fused kernel takes no mask."""
    return None if seen.device.type == "cpu" and not traced() and bool(seen.all()) else seen
