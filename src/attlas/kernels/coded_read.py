"""How the kernel over quantised keys and values reads them: slots, their codes, steps and zeros.

A block is (list of pages or None, its first place, the end of all places, the slots that are held). Its
slots are [warps, slots]: every warp has slots of its own.
"""

# ruff: noqa: N803, N806  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.bits import places


@dataclass(frozen=True)
class Side:
    """Keys or values, as a kernel is compiled for them.

    Attributes:
        bits: of a code.
        dim: channels.
        room: channels with those that fill up words and tiles.
        each: codes of a word.
        tokens: that share a step.
        groups: of channels, where every token has steps of its own; else 1.
        tiles: that a slot's words are cut into, each with groups of its own.
        copies: of each query, for groups that meet in a tile, or to fill the columns of a product.
        stride: words from one slot to the next.
        step_stride: steps from one token, or group of tokens, to the next.
        half: whether codes become float16, and not float32.
    """

    bits: int
    dim: int
    room: int
    each: int
    tokens: int
    groups: int
    tiles: int
    copies: int
    stride: int
    step_stride: int
    half: bool

    @property
    def words(self) -> int:
        """Words of a tile."""
        return self.room // self.each // self.tiles

    @property
    def low(self) -> int:
        """Copies that stand side by side: those that one thread holds."""
        return min(2, self.copies)

    @property
    def high(self) -> int:
        """Times that there are so many."""
        return self.copies // self.low

    @property
    def middle(self) -> float:
        """What float32 codes are smaller by."""
        return 0.0 if self.half else (2**self.bits - 1) / 2

    @property
    def narrow(self) -> bool:
        """Whether steps are loaded one by one, which Triton does not do ahead of their use."""
        return self.tokens == 1 and self.groups == 1


@triton.jit
@no_type_check
def slots_of(block, n, PAGE: tl.constexpr):
    """(What all slots have in common, what each has beyond it, whether it is there) at places n.

    Without a list, all but the common part stays the same from block to block.
    """
    index, start, end, held = block
    inside = n < end - start
    if PAGE > 0:
        page = tl.load(index + (start + n) // PAGE, mask=inside, other=-1).to(tl.int32)
        slot = page.to(tl.int64) * PAGE + (start + n) % PAGE
        common, inside = start * 0, (page >= 0) & (slot < held)
    else:
        common, slot = start, n
    return tl.cast(common, tl.int64), slot, inside


@triton.jit
@no_type_check
def places_of(WARPS: tl.constexpr, SLOTS: tl.constexpr):
    """The places of a block, [warps, slots]."""
    return tl.arange(0, WARPS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]


@triton.jit
@no_type_check
def codes_of(
    data, more, block, SIDE: tl.constexpr, WARPS: tl.constexpr, SLOTS: tl.constexpr,
    PAGE: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Words of a block, and of 3 bits the upper ones: [tiles · warps, slots, words of a tile].

    `ACROSS` has words before slots, as the product with weights takes them; to transpose what was loaded
    would lead it through registers. What is not there may be anything: codes are finite, queries there
    are 0, and weights are.
    """
    WORDS: tl.constexpr = SIDE.words
    tile = tl.arange(0, SIDE.tiles * WARPS)
    n = (tile % WARPS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    w = (tile // WARPS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    common, slot, inside = slots_of(block, n, PAGE)
    at = slot * SIDE.stride
    data, more = data + common * SIDE.stride, more + common * SIDE.stride
    if ACROSS:
        at, inside, w = at[:, None, :], inside[:, None, :], w[:, :, None]
    else:
        at, inside, w = at[:, :, None], inside[:, :, None], w[:, None, :]
    mask = inside & (w < SIDE.dim // SIDE.each) if SIDE.dim < SIDE.room else inside
    words = tl.load(data + (at + w), mask=mask)
    return words, _upper_of(more, at, inside, SIDE, ACROSS) if SIDE.bits == 3 else words


@triton.jit
@no_type_check
def _upper_of(data, at, inside, SIDE: tl.constexpr, ACROSS: tl.constexpr):
    """The byte of upper bits of each word, low in 16 bits, from where two stand together.

    Loads of 8 bits would give all operands another layout, which takes words apart.
    """
    WORDS: tl.constexpr = SIDE.words
    w = tl.arange(0, WORDS // 2)
    shift = (tl.arange(0, WORDS) % 2 * 8).to(tl.int16)
    if ACROSS:
        w = w[None, :, None]
        both = tl.load(data + (at + w), mask=inside & (w < SIDE.dim // 16))[:, :, None, :]
        both = tl.broadcast_to(both, [both.shape[0], both.shape[1], 2, both.shape[3]])
        found = tl.reshape(both, [both.shape[0], WORDS, both.shape[3]]) >> shift[None, :, None]
    else:
        w = w[None, None, :]
        both = tl.load(data + (at + w), mask=inside & (w < SIDE.dim // 16))[:, :, :, None]
        both = tl.broadcast_to(both, [both.shape[0], both.shape[1], both.shape[2], 2])
        found = tl.reshape(both, [both.shape[0], both.shape[1], WORDS]) >> shift[None, None, :]
    return found


@triton.jit
@no_type_check
def steps_of(
    step, zero, block, SIDE: tl.constexpr, WARPS: tl.constexpr, SLOTS: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Steps and zeros of a block, the zeros those of codes as `numbers` counts them.

    Both are [warps, slots], of several groups of channels [warps, slots, tiles · copies]; where tokens
    share them, tuples that have for each place in a word [warps, words].
    """
    if SIDE.tokens == 1:
        common, slot, mask = slots_of(block, places_of(WARPS, SLOTS), PAGE)
        at = slot * SIDE.step_stride
        if SIDE.groups > 1:
            g = tl.arange(0, SIDE.tiles * SIDE.copies)[None, None, :]
            at, mask = at[:, :, None] + g, mask[:, :, None]
            if SIDE.groups < SIDE.tiles * SIDE.copies:
                mask = mask & (g < SIDE.groups)
        step, zero = step + common * SIDE.step_stride, zero + common * SIDE.step_stride
    else:
        common, slot, inside = slots_of(block, tl.arange(0, WARPS) * SLOTS, PAGE)
        w, e = tl.arange(0, SIDE.words)[None, :, None], tl.arange(0, SIDE.each)[None, None, :]
        d = w * SIDE.each + e
        at = ((common + slot) // SIDE.tokens * SIDE.step_stride)[:, None, None] + d
        mask = inside[:, None, None] & (d < SIDE.dim)
    step, zero = tl.load(step + at, mask=mask, other=0.0), tl.load(zero + at, mask=mask, other=0.0)
    if SIDE.middle > 0.0:
        zero = zero.to(tl.float32) + step.to(tl.float32) * SIDE.middle
    if SIDE.tokens > 1:
        step, zero = places(step, SIDE.each), places(zero, SIDE.each)
    return step, zero
