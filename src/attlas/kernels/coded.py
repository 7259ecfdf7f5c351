"""Which quantised segments the kernel takes, how the work on them is cut, and the call.

What a kernel is compiled for follows from the formats of keys and values, never from how many there
are: a program has 16 rows, copies of its queries included, and as many runs are made of each head's
slots as fill the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import e, log2
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.coded_run import over_a_run
from attlas.ops.quantize import Codes
from attlas.ops.segments import Coded


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
        keys: slots of a block at most, a power of two from 16; fewer are taken of wider ones, and where
            queries and groups of tokens in a block would need more than 16 rows.
        warps: that run a program, 1 to 4; more would repeat each other's work on values.
        stages: blocks of codes on their way at once, and the one in work.
        programs: on each multiprocessor; more than fit where heads end at unequal times.
        rows: query rows of a program at least, a power of two up to 16. With fewer, less is computed
            outside the tensor cores, whose other rows hold copies.
    """

    keys: int
    warps: int
    stages: int
    programs: int
    rows: int = 4


#: By the bits of the keys, for keys and values of 128 numbers. No more programs than fit at once: those
#: of these tiles take up to 250 registers a thread.
TILES = {
    8: Tiles(64, 4, 4, 3),
    4: Tiles(128, 2, 3, 4),
    3: Tiles(128, 4, 3, 2),
    2: Tiles(128, 4, 3, 2),
}
#: Rows of all copies together: what the tensor cores take at once.
ROWS = 16


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
    blocks_of_keys: int = -(-_longest(segment) // fixed["KEYS"])
    return max(1, min(wanted, blocks_of_keys))


def coded_attend(
    q: Tensor, segment: Coded, scale: float, sums: Tensor, lses: Tensor, first: int, each: int,
    cut: Tiles | None = None,
) -> None:  # fmt: skip
    """Fill runs `first` to `first + each`: means of the values, and log₂-sum-exp₂ of the scores.

    Args:
        q: queries, [batch, heads, queries, dim], contiguous in the last.
        segment: codes of keys and values.
        scale: of the products.
        sums: [batch, runs, heads, queries, v_dim] float32, to be written.
        lses: [batch, runs, heads, queries] float32, to be written; −∞ where nothing is seen.
        first: the first run that is this segment's.
        each: how many are.
        cut: tiles other than `TILES`.
    """
    cut, fixed, blocks = _compiled(q, segment, cut)
    k, v, index = segment.k, segment.v, segment.index
    places = _places(segment)
    if index is not None and index.stride(-1) != 1:
        index = index.contiguous()
    (k_step, k_zero), (v_step, v_zero) = _both_steps(k), _both_steps(v)
    k_words, v_words = _as_words(k.data, fixed["K_WORD"]), _as_words(v.data, fixed["V_WORD"])
    even = all(
        x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:2])
        for x in (k_words, v_words)
    )
    over_a_run[places * blocks, each, q.shape[0]](
        q, k_words, _other_plane(k), k_step, k_zero, _factors(k),
        v_words, _other_plane(v), v_step, v_zero, _factors(v),
        None if segment.lengths is None else segment.lengths.contiguous(), index, sums, lses,
        scale * log2(e), q.shape[1], q.shape[2], k.tokens, _longest(segment),
        places // k.data.shape[1], blocks, each, first, sums.shape[1],
        *q.stride()[:3], *k_words.stride()[:3], *k_step.stride()[:3],
        *v_words.stride()[:3], *v_step.stride()[:3],
        *((0, 0) if index is None else index.stride()[:2]),
        **fixed, EVEN=even, ASSEMBLY=q.is_cuda, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def _compiled(q: Tensor, segment: Coded, cut: Tiles | None) -> tuple[Tiles, dict[str, Any], int]:
    """(Tiles, what the kernel is compiled for, blocks of rows)."""
    cut = cut or TILES[segment.k.bits]
    rows = q.shape[1] // _places(segment) * q.shape[2]
    page = 0 if segment.index is None else segment.page
    formats = [
        (c.bits, c.dim, c.token_group, c.dim // c.channel_group) for c in (segment.k, segment.v)
    ]
    return cut, *constants(formats[0], formats[1], page, rows, q.dtype, cut)


#: Bits, width, tokens that share a step, groups of channels.
Format = tuple[int, int, int, int]


@cache
def constants(
    k: Format, v: Format, page: int, rows: int, dtype: torch.dtype, cut: Tiles
) -> tuple[dict[str, Any], int]:
    """(What a kernel is compiled for, blocks of rows) for formats of keys and values."""
    groups = max((int(triton.next_power_of_2(f[3])) for f in (k, v) if f[2] == 1), default=1)
    block = min(ROWS // groups, max(cut.rows, triton.next_power_of_2(rows)))
    units = [min(f[2], page or f[2]) * ROWS // block for f in (k, v) if f[2] > 1]
    keys = cut.keys * 256 // triton.next_power_of_2(max(256, k[1] + v[1]))
    keys = max(16, min([keys, *units]))
    half = dtype != torch.float32
    fixed: dict[str, Any] = {
        "ROWS": block, "COPIES": ROWS // block, "KEYS": keys, "PAGE": page, "HALF": half,
        "LOST": 2.0**24 if half else 1.0,
    }  # fmt: skip
    for side, (bits, dim, tokens, count) in (("K", k), ("V", v)):
        # Products of values are split between warps only where they are wider than 16.
        room = max(128 if side == "V" and bits < 4 else 64, triton.next_power_of_2(dim))
        long = room * bits >= (256 if side == "K" else 512) and bits != 3
        given = {
            "DIM": dim, "ROOM": room, "WIDTH": bits, "WORD": 16 if long else 8,
            "TOKENS": tokens, "GROUPS": count, "UNIT": min(keys, tokens, page or tokens),
            # What makes steps times numbers as large as what was coded, whatever the bits.
            "BOOST": 2.0 ** (bits - 2),
        }  # fmt: skip
        fixed |= {f"{side}_{name}": value for name, value in given.items()}
    return fixed, triton.cdiv(rows, block)


def _both_steps(codes: Codes) -> tuple[Tensor, Tensor]:
    """Steps and zeros with the same strides, 1 along the channels."""
    step, zero = codes.step, codes.zero
    if step.stride(-1) == 1 and step.stride() == zero.stride():
        return step, zero
    return step.contiguous(), zero.contiguous()


def _factors(codes: Codes) -> Tensor | None:
    return None if codes.channel is None else codes.channel.contiguous()


def _other_plane(codes: Codes) -> Tensor:
    """Of 3 bits, the upper one; else nothing that is read."""
    return codes.data[..., codes.dim // 4 :] if codes.bits == 3 else codes.data


def _as_words(data: Tensor, word: int) -> Tensor:
    return data if word == 8 else data.view(torch.int16)


def _longest(segment: Coded) -> int:
    return segment.k.tokens if segment.index is None else segment.index.shape[2] * segment.page


def _places(segment: Coded) -> int:
    """Heads that have slots of their own: those of keys, or of lists."""
    return (segment.k.data if segment.index is None else segment.index).shape[1]
