"""Codes of few bits as operands of the tensor cores, nearly for nothing.

A number in float16 whose 5 upper bits are 0 is its bits times 2⁻²⁴, and tensor cores take such numbers.
So a code need not be converted: all but its bits are set to 0, in both halves of a register at once, and
where it stands in the word is a power of 2 that `scale` takes out again.

A word holds the codes of neighbouring channels, low bits first. Those at one place in every word are an
operand by themselves, which meets every second (fourth, …) channel of the queries: `parts` takes a row
apart so, and `whole` puts it together again. Codes of 3 bits lie in two planes, of 2 bits and of 1.
"""

# ruff: noqa: N803, N806, RUF005  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]


def _assembly(width: int, word: int) -> str:
    """PTX for 2 words or 4 bytes in a register: the operand of each place, two codes a register.

    A compiler would take the codes one by one. Bytes are first moved apart by zeros; of 3 bits, those of
    one plane stand in the bytes of one register, those of the other in the low halves of another's.
    """
    masks = word // width if width != 3 else 4
    regs = range(16 // word * masks)
    given = len(regs)
    lines, words = [], "ab" if word == 8 else "a"
    if word == 8:
        lines += [f"prmt.b32 a, ${given}, 0, 0x4140;", f"prmt.b32 b, ${given}, 0, 0x4342;"]
    else:
        lines += [f"mov.b32 a, ${given};"]
    if width == 3:
        lines += [f"prmt.b32 c, ${given + 1}, 0, 0x4140;", f"prmt.b32 d, ${given + 1}, 0, 0x4342;"]
    for n in regs:
        place, half = divmod(n, len(words))
        step = 2 if width == 3 else width
        at, reg = place * step % 8, words[half]
        if place * step == 8:
            lines.append(f"shr.u32 {reg}, {reg}, 8;")
        if width == 3:
            low, more = (bits << at | bits << at + 16 for bits in (3, 4))
            lines.append(f"shl.b32 e, {'cd'[half]}, {place + 2}; and.b32 e, e, {more:#x};")
            lines.append(f"lop3.b32 ${n}, {reg}, {low:#x}, e, 0xEA;")  # (reg & low) | e
        else:
            mask = (1 << width) - 1 << at
            lines.append(f"and.b32 ${n}, {reg}, {mask | mask << 16:#x};")
    return "{.reg .b32 a, b, c, d, e; " + " ".join(lines) + "}"


_8_OF_16 = tl.constexpr(_assembly(8, 16))
_4_OF_16 = tl.constexpr(_assembly(4, 16))
_2_OF_16 = tl.constexpr(_assembly(2, 16))
_4_OF_8 = tl.constexpr(_assembly(4, 8))
_2_OF_8 = tl.constexpr(_assembly(2, 8))
_3_OF_8 = tl.constexpr(_assembly(3, 8))


@triton.jit
@no_type_check
def numbers(
    words, more, WIDTH: tl.constexpr, WORD: tl.constexpr, HALF: tl.constexpr, ASSEMBLY: tl.constexpr
):  # fmt: skip
    """For each place in words of `WORD` bits, the codes there, in one of two ways.

    In float16 they are 2⁻²⁴ / `scale` as large, in float32 smaller by half the largest code.

    Args:
        words: codes of 8, 4 or 2 bits; of 3, their plane of 2 in bytes.
        more: of 3 bits, the other plane, 4 codes to a byte.
        WIDTH: bits of a code.
        WORD: bits of a word.
        HALF: whether float16 is wanted.
        ASSEMBLY: whether Triton compiles, and does not interpret.
    """
    EACH: tl.constexpr = 4 if WIDTH == 3 else WORD // WIDTH
    if HALF and ASSEMBLY:
        found = _assembled(words, more, WIDTH, WORD)
    else:
        found = ()
        for place in tl.static_range(EACH):
            found = found + (_one(words, more, place, WIDTH),)
    result = ()
    for place in tl.static_range(EACH):
        if HALF:
            code = found[place]
            if not ASSEMBLY:
                code = code << place * (2 if WIDTH == 3 else WIDTH) % 8
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
def _assembled(words, more, WIDTH: tl.constexpr, WORD: tl.constexpr):
    if WIDTH == 8:
        found = tl.inline_asm_elementwise(
            _8_OF_16, "=r,=r,r", [words], (tl.int16, tl.int16), is_pure=True, pack=2
        )
    elif WIDTH == 4 and WORD == 8:
        found = tl.inline_asm_elementwise(
            _4_OF_8, "=r,=r,=r,=r,r", [words], (tl.int16, tl.int16), is_pure=True, pack=4
        )
    elif WIDTH == 4:
        found = tl.inline_asm_elementwise(
            _4_OF_16, "=r,=r,=r,=r,r", [words], (tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    elif WIDTH == 3:
        found = tl.inline_asm_elementwise(
            _3_OF_8, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words, more],
            (tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4,
        )  # fmt: skip
    elif WORD == 8:
        found = tl.inline_asm_elementwise(
            _2_OF_8, "=r,=r,=r,=r,=r,=r,=r,=r,r", [words],
            (tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            _2_OF_16, "=r,=r,=r,=r,=r,=r,=r,=r,r", [words],
            (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
    return found


@triton.jit
@no_type_check
def scale(channel, WIDTH: tl.constexpr, WORD: tl.constexpr, HALF: tl.constexpr):
    """What a channel's codes must be multiplied by after `numbers`, but for the 2²⁴ of all."""
    if HALF:
        EACH: tl.constexpr = 4 if WIDTH == 3 else WORD // WIDTH
        at = (channel % EACH) * (2 if WIDTH == 3 else WIDTH) % 8
        factor = 1.0 / (1 << at).to(tl.float32)
    else:
        factor = (channel * 0 + 1).to(tl.float32)
    return factor


@triton.jit
@no_type_check
def _halves(x):
    """Even and odd columns."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
@no_type_check
def parts(x, EACH: tl.constexpr):
    """x [rows, dim] as `EACH` tensors: every `EACH`th column from 0, from 1, …"""
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
    return found


@triton.jit
@no_type_check
def alternate(even, odd):
    """The columns of two tensors in turn."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], even.shape[1] * 2])


@triton.jit
@no_type_check
def whole(x, EACH: tl.constexpr):
    """What `parts` took apart."""
    if EACH == 2:
        joined = alternate(x[0], x[1])
    elif EACH == 4:
        joined = alternate(alternate(x[0], x[2]), alternate(x[1], x[3]))
    else:
        even = alternate(alternate(x[0], x[4]), alternate(x[2], x[6]))
        joined = alternate(even, alternate(alternate(x[1], x[5]), alternate(x[3], x[7])))
    return joined
