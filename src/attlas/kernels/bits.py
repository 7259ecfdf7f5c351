"""Codes of few bits as operands of the tensor cores, nearly for nothing.

A number in float16 whose 5 upper bits are 0 is its bits times 2⁻²⁴, and tensor cores take such numbers.
So a code need not be converted: all but its bits are set to 0, in both halves of a register at once, and
where it stands in the word is a power of 2 that `scale` takes out again.

A word of 16 bits holds the codes of neighbouring channels, low bits first. Those at one place in every
word are an operand by themselves, which meets every second (fourth, eighth) channel of the queries.
Codes of 3 bits lie in two planes: words of their lower 2 bits, and a byte of upper bits for every word.
"""

# ruff: noqa: N803, N806, RUF005  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]


def each(width: int) -> int:
    """Codes of so many bits that a word holds."""
    return 16 // (2 if width == 3 else width)


def _assembly(width: int) -> str:
    """PTX for 2 words in a register: the operand of each place, two codes a register.

    A compiler would take the codes one by one. Of 3 bits, the upper ones of both words stand in the
    halves of another register, and are moved above the lower ones of their place.
    """
    places, step = each(width), 16 // each(width)
    lines = [f"mov.b32 a, ${places};"]
    for n in range(places):
        at = n * step % 8
        if n * step == 8:
            lines.append("shr.u32 a, a, 8;")
        if width == 3:
            shift = at + 2 - n
            move = f"shl.b32 b, ${places + 1}, {shift};"
            if shift < 0:
                move = f"shr.u32 b, ${places + 1}, {-shift};"
            low, more = (bits << at | bits << at + 16 for bits in (3, 4))
            lines.append(f"{move} and.b32 b, b, {more:#x};")
            lines.append(f"lop3.b32 ${n}, a, {low:#x}, b, 0xEA;")  # (a & low) | b
        else:
            mask = (1 << width) - 1 << at
            lines.append(f"and.b32 ${n}, a, {mask | mask << 16:#x};")
    return "{.reg .b32 a, b; " + " ".join(lines) + "}"


_8 = tl.constexpr(_assembly(8))
_4 = tl.constexpr(_assembly(4))
_3 = tl.constexpr(_assembly(3))
_2 = tl.constexpr(_assembly(2))


@triton.jit
@no_type_check
def numbers(
    words, more, WIDTH: tl.constexpr, EACH: tl.constexpr, HALF: tl.constexpr, ASSEMBLY: tl.constexpr
):  # fmt: skip
    """For each of the `EACH` places in words, the codes there, in one of two ways.

    In float16 they are 2⁻²⁴ / `scale` as large, in float32 smaller by half the largest code.

    Args:
        words: codes of 8, 4 or 2 bits, or of 3 bits the lower 2.
        more: of 3 bits, the upper ones of the same channels.
        WIDTH: bits of a code.
        EACH: codes of a word.
        HALF: whether float16 is wanted.
        ASSEMBLY: whether Triton compiles, and does not interpret.
    """
    if HALF and ASSEMBLY:
        found = _assembled(words, more, WIDTH)
    else:
        found = ()
        for place in tl.static_range(EACH):
            found = found + (_one(words, more, place, WIDTH),)
    result = ()
    for place in tl.static_range(EACH):
        if HALF:
            code = found[place]
            if not ASSEMBLY:
                code = code << place * (16 // EACH) % 8
            result = result + (code.to(tl.float16, bitcast=True),)
        else:
            # From the middle of their range, as float32 is to be exact where sums cancel.
            result = result + (found[place].to(tl.float32) - ((1 << WIDTH) - 1) / 2,)
    return result


@triton.jit
@no_type_check
def _one(words, more, PLACE: tl.constexpr, WIDTH: tl.constexpr):
    """Codes at one place, as a compiler takes them."""
    if WIDTH == 3:
        code = ((words >> (2 * PLACE)) & 3) | (((more >> PLACE) & 1) << 2)
    else:
        code = (words >> (WIDTH * PLACE)) & ((1 << WIDTH) - 1)
    return code.to(tl.int16)


@triton.jit
@no_type_check
def _assembled(words, more, WIDTH: tl.constexpr):
    if WIDTH == 8:
        found = tl.inline_asm_elementwise(
            _8, "=r,=r,r", [words], (tl.int16, tl.int16), is_pure=True, pack=2
        )
    elif WIDTH == 4:
        found = tl.inline_asm_elementwise(
            _4, "=r,=r,=r,=r,r", [words], (tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    elif WIDTH == 3:
        found = tl.inline_asm_elementwise(
            _3, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words, more],
            (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            _2, "=r,=r,=r,=r,=r,=r,=r,=r,r", [words],
            (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    return found


@triton.jit
@no_type_check
def scale(PLACE: tl.constexpr, EACH: tl.constexpr, HALF: tl.constexpr):
    """What the codes at a place must be multiplied by after `numbers`, but for the 2²⁴ of all."""
    AT: tl.constexpr = PLACE * (16 // EACH) % 8 if HALF else 0
    return 1.0 / (1 << AT)


@triton.jit
@no_type_check
def places(x, EACH: tl.constexpr):
    """x [warps, words, EACH] as `EACH` tensors [warps, words]."""
    a, b = _halves(x)
    found = (a, b)
    if EACH >= 4:
        a, c = _halves(a)
        b, d = _halves(b)
        found = (a, b, c, d)
        if EACH == 8:
            a, a4 = _halves(a)
            b, b4 = _halves(b)
            c, c4 = _halves(c)
            d, d4 = _halves(d)
            found = (a, b, c, d, a4, b4, c4, d4)
    flat = ()
    for place in tl.static_range(EACH):
        flat = flat + (tl.reshape(found[place], [x.shape[0], x.shape[1]]),)
    return flat


@triton.jit
@no_type_check
def _halves(x):
    """Even and odd places."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))


@triton.jit
@no_type_check
def whole(x, EACH: tl.constexpr):
    """`EACH` tensors [tiles, warps, words, rows] with all places in a word as a last axis."""
    if EACH == 2:
        found = tl.join(x[0], x[1])
    elif EACH == 4:
        found = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    else:
        even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
        found = tl.join(even, tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7])))
    first = x[0]
    return tl.reshape(found, [first.shape[0], first.shape[1], first.shape[2], first.shape[3], EACH])
