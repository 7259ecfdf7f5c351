"""How the kernel over quantised keys and values reads them: slots, their codes, steps and zeros.

A block of slots is [warps, slots]: every warp has slots of its own, and nothing that it reads or sums
meets what others have before the end of a run.
"""

# ruff: noqa: N803, N806  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from attlas.kernels.bits import places


@triton.jit
@no_type_check
def slots_of(index, start, n, end, held, PAGE: tl.constexpr):
    """(A slot, n from there, whether each is there), for places `start` + n, of the list if there is one.

    What is the same for all stands apart, for addresses that differ by constants cost nothing.
    """
    inside = n < end - start
    if PAGE > 0:
        page = tl.load(index + (start + n) // PAGE, mask=inside, other=-1).to(tl.int32)
        base, slot = start * 0, page.to(tl.int64) * PAGE + (start + n) % PAGE
        inside = (page >= 0) & (slot < held)
    else:
        base, slot = start, n
    return tl.cast(base, tl.int64), slot, inside


@triton.jit
@no_type_check
def words_of(
    data, more, index, start, end, held, stride, TILES: tl.constexpr, WARPS: tl.constexpr,
    SLOTS: tl.constexpr, DIM: tl.constexpr, ROOM: tl.constexpr, EACH: tl.constexpr,
    WIDTH: tl.constexpr, PAGE: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Codes of a block, and of 3 bits the upper ones: [tiles · warps, slots, words of a tile].

    `ACROSS` has words before slots, which is how the product with weights takes them. What is not there
    may be anything: codes are finite, queries there are 0, and weights are.
    """
    WORDS: tl.constexpr = ROOM // EACH // TILES
    tile = tl.arange(0, TILES * WARPS)
    n = (tile % WARPS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    w = (tile // WARPS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    base, slot, inside = slots_of(index, start, n, end, held, PAGE)
    if ACROSS:
        at, inside, w = (slot * stride)[:, None, :], inside[:, None, :], w[:, :, None]
    else:
        at, inside, w = (slot * stride)[:, :, None], inside[:, :, None], w[:, None, :]
    mask = inside & (w < DIM // EACH) if DIM < ROOM else inside
    words = tl.load(data + base * stride + (at + w), mask=mask)
    other = words
    if WIDTH == 3:
        other = _upper_of(more + base * stride, at, inside, tile // WARPS * WORDS, DIM, WORDS, ACROSS)
    return words, other


@triton.jit
@no_type_check
def _upper_of(data, at, inside, first, DIM: tl.constexpr, WORDS: tl.constexpr, ACROSS: tl.constexpr):
    """The byte of upper bits of each word, from where two share a word of 16 bits."""
    w = first[:, None] // 2 + tl.arange(0, WORDS // 2)[None, :]
    odd = (tl.arange(0, WORDS) % 2 * 8).to(tl.int16)
    if ACROSS:
        mask = inside & (w < DIM // 16)[:, :, None]
        both = tl.load(data + (at + w[:, :, None]), mask=mask)
        both = tl.broadcast_to(both[:, :, None, :], [both.shape[0], both.shape[1], 2, both.shape[2]])
        both = tl.reshape(both, [both.shape[0], WORDS, both.shape[3]]) >> odd[None, :, None]
    else:
        mask = inside & (w < DIM // 16)[:, None, :]
        both = tl.load(data + (at + w[:, None, :]), mask=mask)
        both = tl.broadcast_to(both[:, :, :, None], [both.shape[0], both.shape[1], both.shape[2], 2])
        both = tl.reshape(both, [both.shape[0], both.shape[1], WORDS]) >> odd[None, None, :]
    return both


@triton.jit
@no_type_check
def token_steps(
    data, index, start, end, held, stride, WARPS: tl.constexpr, SLOTS: tl.constexpr,
    GROUPS: tl.constexpr, ALL: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Steps or zeros of a block's tokens: [warps, slots], with several groups [warps, slots, ALL]."""
    n = tl.arange(0, WARPS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    base, slot, inside = slots_of(index, start, n, end, held, PAGE)
    data += base * stride
    if GROUPS == 1:
        found = tl.load(data + slot * stride, mask=inside, other=0.0)
    else:
        g = tl.arange(0, ALL)[None, None, :]
        mask = inside[:, :, None]
        if GROUPS < ALL:
            mask = mask & (g < GROUPS)
        found = tl.load(data + ((slot * stride)[:, :, None] + g), mask=mask, other=0.0)
    return found


@triton.jit
@no_type_check
def channel_steps(
    data, index, start, end, held, stride, WARPS: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, ROOM: tl.constexpr, EACH: tl.constexpr, TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Steps or zeros that a warp's slots share: for each place in a word, [warps, words]."""
    first = tl.arange(0, WARPS) * SLOTS
    base, slot, inside = slots_of(index, start, first, end, held, PAGE)
    at = ((base + slot) // TOKENS * stride)[:, None, None]
    d = tl.arange(0, ROOM // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    mask = inside[:, None, None]
    if DIM < ROOM:
        mask = mask & (d < DIM)[None, :, :]
    return places(tl.load(data + at + d[None, :, :], mask=mask, other=0.0), EACH)
