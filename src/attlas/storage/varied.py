"""Numbers of which every group has bits of its own, with outliers kept exactly beside them.

A group is one token of all heads, or of one head. Its codes lie in a buffer of all groups of their
width, in the order of tokens, so that a run of tokens is a run in every buffer; widths alone say where.

    uniform   x̂ = (code − 2ⁿ⁻¹) · scale + mean
    normal    x̂ = Φ⁻¹((code + ½) / 2ⁿ) · scale + mean
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from attlas.errors import UserError
from attlas.ops.segments import Block
from attlas.storage.body import Body

#: Width of a group that is a hole: nothing is held of it.
HOLE = 255


@dataclass(frozen=True)
class Varied:
    """Keys or values with bits of their own for every group; tokens come first.

    Attributes:
        bits: width of each group's codes, 0 to 16, `HOLE` where there is none.
        mean: of a group.
        scale: of a group.
        counts: outliers of each group.
        positions: where in its group each outlier stands.
        outliers: what they are.
        data: packed codes of all groups of a width, by width.
        heads: heads of the model.
        normal: codes are of equally probable bins of a normal distribution.
    """

    bits: Integer[Tensor, "tokens batch groups"]
    mean: Float[Tensor, "tokens batch groups"]
    scale: Float[Tensor, "tokens batch groups"]
    counts: Integer[Tensor, "tokens batch groups"]
    positions: Integer[Tensor, " found"]
    outliers: Float[Tensor, " found"]
    data: dict[int, Integer[Tensor, "rows bytes"]]
    heads: int
    dim: int
    normal: bool

    @classmethod
    def packed(
        cls,
        x: Float[Tensor, "tokens batch groups width"],
        bits: Integer[Tensor, "tokens batch groups"],
        mean: Float[Tensor, "tokens batch groups"],
        scale: Float[Tensor, "tokens batch groups"],
        apart: Bool[Tensor, "tokens batch groups width"],
        *,
        heads: int,
        normal: bool,
    ) -> Varied:
        """Numbers in the given bits, but for those that are kept apart."""
        bits = bits.to(torch.uint8)
        hole = bits == HOLE
        apart = apart & ~hole[..., None]
        mean, scale = (t.masked_fill(hole, 0.0) for t in (mean, scale))  # of padding: not a number
        unit = torch.where(scale == 0, 1.0, scale).float()
        rest = (x.float() - mean.float()[..., None]) / unit[..., None]
        widths = [int(n) for n in bits.unique() if n != HOLE]
        data = {n: pack(_codes(rest[bits == n], n, normal), n) for n in widths}
        small = torch.int16 if x.shape[-1] <= 2**15 else torch.int32
        positions = apart.nonzero()[:, -1].to(small)
        return cls(
            bits, mean, scale, apart.sum(dim=-1).to(small), positions, x[apart], data, heads,
            x.shape[2] * x.shape[3] // heads, normal,
        )  # fmt: skip

    def read(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "b h tokens dim"]:
        """Tokens `start` to `stop` as numbers."""
        bits, counts = self.bits[start:stop], self.counts[start:stop]
        width = self.heads * self.dim // bits.shape[2]
        rest = self.mean.new_zeros(*bits.shape, width)
        for n, data in self.data.items():
            of = bits == n
            first = int((self.bits[:start] == n).sum())
            codes = unpack(data[first : first + int(of.sum())], n, width)
            rest[of] = _numbers(codes, n, self.normal).to(rest.dtype)
        x = rest * self.scale[start:stop, ..., None] + self.mean[start:stop, ..., None]
        first, found = int(self.counts[:start].sum()), int(counts.sum())
        group = torch.arange(counts.numel(), device=x.device)
        group = group.repeat_interleave(counts.flatten().long())
        at = self.positions[first : first + found].long()
        x.view(-1, width)[group, at] = self.outliers[first : first + found]
        numbers: Tensor = x.flatten(2).unflatten(2, (self.heads, self.dim)).permute(1, 2, 0, 3)
        return numbers

    def rows(self, order: Int[Tensor, " rows"]) -> Varied:
        """The same with its rows in another order."""
        bits, counts = self.bits[:, order], self.counts[:, order]
        data = {}
        for n, held in self.data.items():
            place = ((self.bits == n).flatten().cumsum(0) - 1).view_as(self.bits)
            data[n] = held[place[:, order][bits == n]]
        each, new = self.counts.long(), counts.flatten().long()
        start = (each.flatten().cumsum(0) - each.flatten()).view_as(each)[:, order].flatten()
        inside = torch.arange(int(new.sum()), device=new.device)
        inside = inside - (new.cumsum(0) - new).repeat_interleave(new)
        at = start.repeat_interleave(new) + inside
        return replace(
            self, bits=bits, counts=counts, mean=self.mean[:, order], scale=self.scale[:, order],
            positions=self.positions[at], outliers=self.outliers[at], data=data,
        )  # fmt: skip

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name."""
        names = ("bits", "mean", "scale", "counts", "positions", "outliers")
        held = {name: getattr(self, name) for name in names}
        return held | {f"data{n}": data for n, data in self.data.items()}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], form: dict[str, Any]) -> Varied:
        """What these tensors hold."""
        data = {int(n[4:]): t for n, t in tensors.items() if n.startswith("data")}
        rest: dict[str, Any] = {n: t for n, t in tensors.items() if not n.startswith("data")}
        return cls(**rest, **form, data=data)


class VariedBody(Body):
    """Keys and values with bits of their own for every group. It does not grow.

    Args:
        k: keys.
        v: values.
        index: original positions, −1 for a hole; None for `first` and on.
        first: column of slot 0 where there is no index.
    """

    kind = "varied"

    def __init__(
        self,
        k: Varied,
        v: Varied,
        index: Int[Tensor, "batch kv_heads slots"] | None = None,
        first: int = 0,
    ) -> None:
        self.k, self.v, self.index, self.first = k, v, index, first

    @property
    def slots(self) -> int:
        """Tokens of the longest row."""
        return self.k.bits.shape[0]

    def segment(self, index: Tensor | None = None, page: int = 1) -> VariedSegment:
        """All slots."""
        if index is not None:
            raise UserError("numbers with bits of their own cannot be read by a list")
        return VariedSegment(self)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as numbers."""
        return self.k.read(), self.v.read()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is held of keys and values, and the columns."""
        pairs = {"k": self.k, "v": self.v}
        held = {f"{name}.{n}": t for name, x in pairs.items() for n, t in x.tensors.items()}
        return held if self.index is None else {**held, "index": self.index}

    @property
    def constants(self) -> dict[str, Any]:
        """Sizes and quantisers."""
        names = ("heads", "dim", "normal")
        forms = {n: {f: getattr(getattr(self, n), f) for f in names} for n in ("k", "v")}
        return {"first": self.first, **forms}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], constants: dict[str, Any]) -> VariedBody:
        """The body of these tensors."""
        k, v = (
            Varied.restored(
                {n[2:]: t for n, t in tensors.items() if n.startswith(f"{name}.")}, constants[name]
            )
            for name in ("k", "v")
        )
        return cls(k, v, tensors.get("index"), constants["first"])

    def rows(self, change: Callable[[Tensor], Tensor]) -> VariedBody:
        """The body with its rows in another order, some of them or repeated."""
        order = change(torch.arange(self.k.bits.shape[1], device=self.k.bits.device))
        index = None if self.index is None else change(self.index)
        return VariedBody(self.k.rows(order), self.v.rows(order), index, self.first)


@dataclass(frozen=True)
class VariedSegment:
    """All slots of a body."""

    body: VariedBody

    @property
    def nbytes(self) -> int:
        """Codes, outliers and what goes with them."""
        parts = (self.body.k, self.body.v)
        return sum(t.nbytes for x in parts for t in x.tensors.values())

    def blocks(self, queries: int, size: int) -> Iterator[Block]:
        """Runs of slots, read as numbers run by run."""
        index = self.body.index
        for start in range(0, self.body.slots, size):
            stop = min(start + size, self.body.slots)
            seen = None if index is None else (index[:, :, None, start:stop] >= 0)
            yield self.body.k.read(start, stop), self.body.v.read(start, stop), seen, None


def _codes(x: Float[Tensor, "rows width"], n: int, normal: bool) -> Integer[Tensor, "rows width"]:
    """Codes 0 to 2ⁿ − 1 of centred and scaled numbers."""
    if not normal:
        codes: Tensor = (x.round() + 2**n / 2).clamp(0, 2**n - 1).int()
        return codes
    edges = torch.arange(1, 2**n, device=x.device, dtype=torch.float64) / 2**n
    return torch.searchsorted(torch.special.ndtri(edges).float(), x.contiguous(), out_int32=True)


def _numbers(
    codes: Integer[Tensor, "rows width"], n: int, normal: bool
) -> Float[Tensor, "rows width"]:
    """The numbers that codes stand for, centred and scaled."""
    if not normal:
        numbers: Tensor = codes.float() - 2**n / 2
        return numbers
    centres = (torch.arange(2**n, device=codes.device, dtype=torch.float64) + 0.5) / 2**n
    at_centres: Tensor = torch.special.ndtri(centres).float()[codes.long()]
    return at_centres


def pack(codes: Integer[Tensor, "rows width"], n: int) -> Integer[Tensor, "rows bytes"]:
    """Codes of n bits as bytes: a plane for each bit, the last byte filled up."""
    if not n:
        return codes.new_empty(codes.shape[0], 0, dtype=torch.uint8)
    shifts = torch.arange(n, device=codes.device, dtype=torch.int32)
    planes = ((codes[:, None] >> shifts[:, None]) & 1).flatten(1)
    planes = torch.nn.functional.pad(planes, (0, -planes.shape[1] % 8)).unflatten(1, (-1, 8))
    weights = 1 << torch.arange(8, device=codes.device, dtype=torch.int32)
    data: Tensor = (planes * weights).sum(dim=-1).to(torch.uint8)
    return data


def unpack(
    data: Integer[Tensor, "rows bytes"], n: int, width: int
) -> Integer[Tensor, "rows width"]:
    """What `pack` packed."""
    inside = torch.arange(8, device=data.device, dtype=torch.uint8)
    planes = ((data[..., None] >> inside) & 1).flatten(1)[:, : n * width].unflatten(1, (n, width))
    shifts = torch.arange(n, device=data.device, dtype=torch.int32)
    codes: Tensor = (planes.int() << shifts[:, None]).sum(dim=1, dtype=torch.int32)
    return codes
