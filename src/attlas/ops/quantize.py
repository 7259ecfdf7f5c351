"""Numbers in few bits: asymmetric uniform codes with a step and a zero for each group.

    step = (max − zero) / (2ᵇ − 1)     zero = min      over a group of tokens × channels
    code = round((x / channel − zero) / step)          x̂ = (code · step + zero) · channel

Zeros are rounded down and steps up to the type in which they are held, so that every number is within
half a step of its code.

A group is `token_group` tokens of `channel_group` channels: (1, dim) is per token, (n, 1) per channel
over runs of n tokens, (1, g) grouped. `channel`, where it is given, is a factor per channel that the
numbers were divided by first (channel-separable codes). Codes are packed densely: b bits are b / 8
bytes, 3 bits as a plane of 2 and a plane of 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from attlas.errors import UserError
from attlas.ops.reference import taken

#: Widths of a code that there are, as the widths of the planes that they are packed in.
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
#: Integers of as many bytes.
WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Codes:
    """Keys or values in `bits` bits.

    Attributes:
        data: packed codes, `dim · bits / 8` bytes a token.
        step: size of a code's unit, by group.
        zero: value of code 0, by group.
        bits: 8, 4, 3, 2 or 1.
        dim: channels.
        token_group: tokens that share a step; the last group may hold fewer.
        channel_group: channels that share a step.
        channel: factor of each channel, or None.
        dtype: of the numbers that are read; they are computed in float32 at least.
    """

    data: Integer[Tensor, "batch heads tokens bytes"]
    step: Float[Tensor, "batch heads token_groups channel_groups"]
    zero: Float[Tensor, "batch heads token_groups channel_groups"]
    bits: int
    dim: int
    token_group: int = 1
    channel_group: int = 0
    channel: Float[Tensor, "batch heads 1 dim"] | None = None
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        """How many tokens are held."""
        return self.data.shape[2]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name."""
        held = {"data": self.data, "step": self.step, "zero": self.zero}
        return held if self.channel is None else {**held, "channel": self.channel}

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, steps, zeros and channel factors."""
        return sum(t.nbytes for t in self.tensors.values())

    def with_tensors(self, tensors: dict[str, Tensor]) -> Codes:
        """The same format over other tensors, as rows in another order."""
        changed: dict[str, Any] = {**tensors}
        return replace(self, **changed)

    def read(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "b h tokens dim"]:
        """Tokens `start` to `stop` as numbers of `dtype`."""
        stop = self.tokens if stop is None else min(stop, self.tokens)
        at = torch.arange(start, stop, device=self.data.device) // self.token_group
        return self._numbers(self.data[:, :, start:stop], lambda x: x[:, :, at])

    def gather(self, slots: Int[Tensor, "b h n"]) -> Float[Tensor, "b h n dim"]:
        """The tokens at `slots`, by row and head; more heads than are held repeat them."""
        repeats = slots.shape[1] // self.data.shape[1]
        slots = slots.long()
        return self._numbers(
            taken(self.data, slots), lambda x: taken(x, slots // self.token_group), repeats
        )

    def _numbers(self, data: Tensor, of: Callable[[Tensor], Tensor], repeats: int = 1) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        codes = unpack(data, self.bits, self.dim)
        groups = self.step.shape[-1]
        step, zero = (of(x).to(wide)[..., None] for x in (self.step, self.zero))
        # In place: memory that is asked for anew at every step costs a CPU more than the arithmetic.
        grouped = codes.to(wide).unflatten(-1, (groups, -1))
        numbers: Tensor = grouped.mul_(step).add_(zero).flatten(-2)
        if self.channel is not None:
            numbers = numbers.mul_(self.channel.to(wide).repeat_interleave(repeats, dim=1))
        return numbers.to(self.dtype)


def encode(
    x: Float[Tensor, "batch heads tokens dim"],
    bits: int,
    *,
    token_group: int = 1,
    channel_group: int | None = None,
    channel: Float[Tensor, "batch heads 1 dim"] | None = None,
    meta: torch.dtype = torch.float16,
) -> Codes:
    """`x` in `bits` bits.

    Args:
        x: keys or values.
        bits: 8, 4, 3, 2 or 1.
        token_group: tokens that share a step.
        channel_group: channels that share a step; all of them unless given.
        channel: divide each channel by this first, and multiply when read.
        meta: type of steps and zeros; float16 ends at 65504, and numbers beyond need float32.

    Raises:
        ValueError: bits that are not offered, groups that do not divide the channels, or a width
            whose codes do not fill whole bytes.
    """
    dim = x.shape[-1]
    group = dim if channel_group is None else channel_group
    check(bits, dim, group, token_group)
    wide = x.float() if channel is None else x.float() / channel.float()
    blocks, valid = _blocks(wide, token_group, group)
    low = blocks.masked_fill(~valid, torch.inf).amin(dim=(3, 5), keepdim=True)
    high = blocks.masked_fill(~valid, -torch.inf).amax(dim=(3, 5), keepdim=True)
    zero = -_raised(-low, meta)
    step = _raised((high - zero.float()) / (2**bits - 1), meta)
    unit = torch.where(step == 0, 1.0, step.float())  # a group of equal numbers has code 0 alone
    codes = ((blocks - zero.float()) / unit).round().clamp(0, 2**bits - 1)
    codes = codes.flatten(4).flatten(2, 3)[:, :, : x.shape[2]].to(torch.uint8)
    return Codes(
        pack(codes, bits), step.squeeze((3, 5)), zero.squeeze((3, 5)), bits, dim, token_group, group,
        channel, x.dtype,
    )  # fmt: skip


def _raised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, never less than it was."""
    info = torch.finfo(dtype)
    near = x.to(dtype)
    above = x + x.abs() * info.eps + info.smallest_normal * info.eps
    return torch.where(near.to(x.dtype) < x, above.to(dtype), near)


def _blocks(x: Tensor, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """x as [batch, heads, token groups, tokens, channel groups, channels], and what of it is valid."""
    short = -x.shape[2] % tokens
    valid = torch.ones(x.shape[2], dtype=torch.bool, device=x.device)
    padded = torch.nn.functional.pad(x, (0, 0, 0, short))
    valid = torch.nn.functional.pad(valid, (0, short)).unflatten(0, (-1, tokens))
    blocks = padded.unflatten(2, (-1, tokens)).unflatten(-1, (-1, channels))
    return blocks, valid[:, :, None, None]


def check(bits: int, dim: int, channel_group: int, token_group: int) -> None:
    """Raise a ValueError when numbers of width `dim` cannot be coded so."""
    if bits not in PLANES:
        raise UserError(f"bits takes one of {sorted(PLANES)}, got {bits}")
    if token_group < 1:
        raise UserError(f"token_group must be at least 1, got {token_group}")
    if channel_group < 1 or dim % channel_group:
        raise UserError(f"channel_group must divide the {dim} channels, got {channel_group}")
    least = 8 // min(PLANES[bits])
    if dim % least:
        raise UserError(f"{bits} bits need a multiple of {least} channels, got {dim}")


def pack(codes: Integer[Tensor, "*rows dim"], bits: int) -> Integer[Tensor, "*rows bytes"]:
    """Codes as bytes: in each plane, byte j holds the codes of neighbouring channels, low bits first."""
    packed, shift = [], 0
    for width in PLANES[bits]:
        plane = (codes >> shift) & (2**width - 1)
        each = 8 // width
        shifts = torch.arange(each, device=codes.device, dtype=torch.uint8) * width
        packed.append((plane.unflatten(-1, (-1, each)) << shifts).sum(-1, dtype=torch.uint8))
        shift += width
    return packed[0] if len(packed) == 1 else torch.cat(packed, dim=-1)


def unpack(
    data: Integer[Tensor, "*rows bytes"], bits: int, dim: int
) -> Integer[Tensor, "*rows dim"]:
    """What `pack` packed."""
    found: Tensor | None = None
    start, shift = 0, 0
    for width in PLANES[bits]:
        each = 8 // width
        plane = data[..., start : start + dim // each]
        start += dim // each
        if each > 1:
            plane = _spread(plane, width, each)
        found = plane if found is None else found | (plane << shift)
        shift += width
    assert found is not None
    return found


def _spread(
    plane: Integer[Tensor, "*rows bytes"], width: int, each: int
) -> Integer[Tensor, "*rows codes"]:
    """The codes of `width` bits of which every byte holds `each`, the lowest first, a byte for each.

    They are moved apart inside one wide integer, whose bytes are then the codes: on a CPU several
    times as fast as an axis of two or four behind the bytes.
    """
    wide = plane.to(WIDE[each])
    apart = torch.zeros_like(wide)
    for code in range(each):
        byte = code if sys.byteorder == "little" else each - 1 - code
        apart |= (wide >> (code * width)).bitwise_and_(2**width - 1).bitwise_left_shift_(8 * byte)
    return apart.contiguous().view(torch.uint8)
