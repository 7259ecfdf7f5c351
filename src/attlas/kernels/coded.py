"""Which quantised segments the kernel takes, how the work on them is cut, and the call.

What a kernel is compiled for follows from the formats of keys and values, never from how many there
are; as many runs are made of each head's slots as fill the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import e, log2
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.bits import each
from attlas.kernels.coded_read import Side
from attlas.kernels.coded_run import over_a_run
from attlas.ops.quantize import Codes
from attlas.ops.segments import Coded


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        slots: of a block that one warp takes, a power of two from 16; fewer are taken of wider ones,
            and of groups of tokens or pages that are smaller.
        warps: that run a program, each on slots of its own.
        stages: blocks of codes on their way at once, and the one in work.
        programs: on each multiprocessor; more than fit where heads end at unequal times.
        registers: of a thread at most.
        rows: query rows of a program at least, a power of two up to 16. With fewer, less is computed
            outside the tensor cores, which take 8 columns.
    """

    slots: int
    warps: int
    stages: int
    programs: int
    registers: int
    rows: int = 4


#: By the bits of the keys, for keys and values of 128 numbers. No more programs than fit at once.
TILES = {
    8: Tiles(32, 4, 3, 2, 200),
    4: Tiles(64, 2, 3, 4, 255),
    3: Tiles(64, 2, 3, 3, 200),
    2: Tiles(64, 2, 3, 4, 255),
}
#: Columns that a product of the tensor cores has at least; rows of queries with their copies at most.
COLUMNS, ROWS = 8, 16


def coded_refuses(q: Tensor, segment: Coded) -> str | None:
    """Why the kernel cannot take this segment, None when it can."""
    if segment.k.dim != q.shape[-1]:
        return f"keys are {segment.k.dim} wide, queries {q.shape[-1]}"
    if torch.is_grad_enabled() and q.requires_grad:
        return "gradients are wanted"
    page = None if segment.index is None else segment.page
    reason = _refused(segment.k, "keys", page)
    return _refused(segment.v, "values", page) if reason is None else reason


def _refused(codes: Codes, name: str, page: int | None) -> str | None:
    """Why the kernel cannot read these codes; with a `page` where they are listed."""
    tokens, channels, data = codes.token_group, codes.channel_group, codes.data
    if not _on_device(codes):
        return f"{name} are not on a CUDA device"
    if codes.bits not in TILES:
        return f"{name} have {codes.bits} bits, not one of {sorted(TILES)}"
    if codes.dim % 16 or not 16 <= codes.dim <= 256:
        return f"{name} are {codes.dim} wide, not a multiple of 16 up to 256"
    if not codes.tokens:
        return f"there are no {name}"
    if data.stride(-1) != 1 or any(n % 2 for n in (data.storage_offset(), *data.stride()[:3])):
        return f"the codes of {name} cannot be read in words of 16 bits"
    if tokens == 1:
        groups = codes.dim // channels
        return f"{name} have {groups} groups of channels, over {ROWS}" if groups > ROWS else None
    if channels != 1:
        return f"{tokens} tokens by {channels} channels share a step of {name}"
    if tokens < 16 or tokens & (tokens - 1):
        return f"{tokens} tokens share a step of {name}, not 16, 32, 64, …"
    if page is not None and (page < 16 or tokens % page):
        return f"pages of {page} are below 16, or do not divide the {tokens} tokens of a step of {name}"
    return None


def _on_device(codes: Codes) -> bool:
    return all(t.is_cuda for t in codes.tensors.values())


def coded_runs(q: Tensor, segment: Coded, units: int, cut: Tiles | None = None) -> int:
    """Into how many runs the slots of each head are cut, to give `units` multiprocessors work."""
    cut, fixed, blocks = _compiled(q, segment, cut)
    wanted = units * cut.programs // (q.shape[0] * _places(segment) * blocks)
    blocks_of_keys: int = -(-_longest(segment) // (fixed["WARPS"] * fixed["SLOTS"]))
    return max(1, min(wanted, blocks_of_keys))


def coded_attend(
    q: Tensor, segment: Coded, scale: float, sums: Tensor, lses: Tensor, first: int, count: int,
    cut: Tiles | None = None,
) -> None:  # fmt: skip
    """Fill runs `first` to `first + count`: means of the values, and log₂-sum-exp₂ of the scores.

    Args:
        q: queries, [batch, heads, queries, dim], contiguous in the last.
        segment: codes of keys and values.
        scale: of the products.
        sums: [batch, runs, heads, queries, v_dim] float32, to be written.
        lses: [batch, runs, heads, queries] float32, to be written; −∞ where nothing is seen.
        first: the first run that is this segment's.
        count: how many are.
        cut: tiles other than `TILES`.
    """
    cut, fixed, blocks = _compiled(q, segment, cut)
    k, v, index = segment.k, segment.v, segment.index
    places = _places(segment)
    if index is not None and index.stride(-1) != 1:
        index = index.contiguous()
    (k_words, k_more), (v_words, v_more) = _planes(k), _planes(v)
    (k_step, k_zero), (v_step, v_zero) = _both_steps(k), _both_steps(v)
    over_a_run[places * blocks, count, q.shape[0]](
        q, k_words, k_more, k_step, k_zero, _factors(k),
        v_words, v_more, v_step, v_zero, _factors(v),
        None if segment.lengths is None else segment.lengths.contiguous(), index, sums, lses,
        scale * log2(e), q.shape[1], q.shape[2], k.tokens, _longest(segment),
        places // k.data.shape[1], blocks, count, first, sums.shape[1],
        *q.stride()[:3], *k_words.stride()[:2], *k_step.stride()[:2],
        *v_words.stride()[:2], *v_step.stride()[:2],
        *((0, 0) if index is None else index.stride()[:2]),
        **fixed, EVEN=_even(16, k_words, v_words), EVEN_STEPS=_even(8, k_step, k_zero, v_step, v_zero),
        ASSEMBLY=q.is_cuda, num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers,
    )  # fmt: skip


def _compiled(q: Tensor, segment: Coded, cut: Tiles | None) -> tuple[Tiles, dict[str, Any], int]:
    """(Tiles, what the kernel is compiled for, blocks of rows)."""
    cut = cut or TILES[segment.k.bits]
    rows = q.shape[1] // _places(segment) * q.shape[2]
    page = 0 if segment.index is None else segment.page
    k, v = _format(segment.k), _format(segment.v)
    return cut, *constants(k, v, page, rows, q.dtype, cut)


#: Bits, width, tokens that share a step, groups of channels, and strides of words and steps.
Format = tuple[int, int, int, int, int, int]


def _format(codes: Codes) -> Format:
    groups = codes.dim // codes.channel_group
    words, steps = codes.data.stride(2) // 2, codes.step.stride(2) if _alike(codes) else groups
    return codes.bits, codes.dim, codes.token_group, groups, words, steps


@cache
def constants(
    k: Format, v: Format, page: int, rows: int, dtype: torch.dtype, cut: Tiles
) -> tuple[dict[str, Any], int]:
    """(What a kernel is compiled for, blocks of rows) for formats of keys and values."""
    groups = max((_power(f[3]) for f in (k, v) if f[2] == 1), default=1)
    block = min(ROWS // groups, max(cut.rows, _power(rows)))
    units = [min(f[2], page or f[2]) for f in (k, v) if f[2] > 1]
    slots = cut.slots * 256 // _power(max(256, k[1] + v[1]))
    half = dtype != torch.float32
    return {
        "KEYS": _side(k, block, half), "VALUES": _side(v, block, half),
        # What makes steps times queries, or weights, as large as what was coded, whatever the bits.
        "BOOST": 2.0 ** (k[0] - 2) if k[2] > 1 else 1.0, "MORE": float(v[0] - 2),
        "ROWS": block, "WARPS": cut.warps, "SLOTS": max(16, min([slots, *units])), "PAGE": page,
    }, triton.cdiv(rows, block)  # fmt: skip


def _side(form: Format, rows: int, half: bool) -> Side:
    bits, dim, tokens, groups, stride, step_stride = form
    groups = groups if tokens == 1 else 1
    room, padded = max(16 * each(bits), _power(dim)), _power(groups)
    tiles = 1
    if room * groups == dim * padded:  # groups are powers of 2 wide: no tile has part of one
        while room // each(bits) // tiles >= 32 and padded // (2 * tiles) * rows >= COLUMNS:
            tiles *= 2
    copies = max(COLUMNS // rows, padded // tiles)
    return Side(
        bits, dim, room, each(bits), tokens, groups, tiles, copies, stride, step_stride, half
    )


def _power(count: int) -> int:
    return int(triton.next_power_of_2(count))


def _both_steps(codes: Codes) -> tuple[Tensor, Tensor]:
    """Steps and zeros with the same strides, 1 along the channels."""
    step, zero = codes.step, codes.zero
    return (step, zero) if _alike(codes) else (step.contiguous(), zero.contiguous())


def _alike(codes: Codes) -> bool:
    """Whether steps and zeros have the same strides, 1 along the channels."""
    return codes.step.stride(-1) == 1 and codes.step.stride() == codes.zero.stride()


def _even(unit: int, *tensors: Tensor) -> bool:
    """Whether all heads' parts begin at multiples of so many bytes."""
    heads = (n * t.element_size() for t in tensors for n in t.stride()[:2])
    return not any(n % unit for n in (*heads, *(t.data_ptr() for t in tensors)))


def _factors(codes: Codes) -> Tensor | None:
    return None if codes.channel is None else codes.channel.contiguous()


def _planes(codes: Codes) -> tuple[Tensor, Tensor]:
    """Words of 16 bits: the codes, or of 3 bits the lower plane, and behind it the upper one."""
    words = codes.data.view(torch.int16)
    return words, words[..., codes.dim // 8 :] if codes.bits == 3 else words


def _longest(segment: Coded) -> int:
    return segment.k.tokens if segment.index is None else segment.index.shape[2] * segment.page


def _places(segment: Coded) -> int:
    """Heads that have slots of their own: those of keys, or of lists."""
    return (segment.k.data if segment.index is None else segment.index).shape[1]
