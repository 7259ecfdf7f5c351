"""The FlexAttention route: a pattern as a BlockMask, a change of scores fused into the kernel."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from attlas.masks import Mask, block_mask
from attlas.ops.fused import Programs
from attlas.positions.base import ScoreMod, from_table

#: Patterns, changes of scores and shape classes that one process may compile.
PROGRAMS = 256
#: With a change of scores, a program of PyTorch's own size may find no room in shared memory.
ROOM = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}
#: Width of keys and values up to which its accumulators find room.
WIDTH = 256
#: Lengths that are multiples of this are compiled each by itself: a kernel for any length is half as
#: fast at 32k. Odd lengths, of which there are many, share one.
EVEN = 1024


def flex(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, scale: float, q_offset: int,
    score_mod: ScoreMod | None = None, table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) through FlexAttention, compiled on an accelerator, plain on a CPU.

    What changes the scores is `score_mod`, or a `table` of numbers for heads and distances: a tensor that
    the kernel is given, so that each call may have its own.
    """
    change = from_table(table, q_offset) if table is not None else _shifted(score_mod, q_offset)
    blocks = None
    if mask is not None:
        blocks = block_mask(mask, q.shape[2], k.shape[2], q_offset=q_offset, device=q.device)
    if not torch.is_grad_enabled():  # on a CPU it refuses tensors that could train, used or not
        q, k, v = q.detach(), k.detach(), v.detach()
    compiling = torch.compiler.is_compiling()
    even = q.shape[2] % EVEN == 0 == k.shape[2] % EVEN
    kernel = flex_attention if q.device.type != "cuda" or compiling else _compiled(even)
    # Every pattern is a program of its own; at Dynamo's default of 8 the ninth would run unfused.
    with nullcontext() if compiling else Programs(PROGRAMS):
        out, aux = kernel(
            q, k, v, score_mod=change, block_mask=blocks, scale=scale,
            enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True),
            kernel_options=ROOM if change is not None and q.itemsize == 2 else None,
        )  # fmt: skip
    return out, aux.lse


def refuses(q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None) -> str | None:
    """Why FlexAttention cannot take this call, or None when it can."""
    if isinstance(mask, Tensor):
        return "a dense mask has no blocks to skip"
    if k.shape[1] != v.shape[1]:
        return "keys and values have different numbers of heads"
    if (
        q.device.type == "cpu"
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in (q, k, v))
    ):
        return "FlexAttention has no backward pass on a CPU"
    if q.device.type == "cuda" and (q.shape[-1] < 16 or q.dtype == torch.float64):
        return "its kernel needs head widths of at least 16 and at most 32-bit floats"
    if q.device.type == "cuda" and max(q.shape[-1], v.shape[-1]) > WIDTH:
        return f"its kernel takes heads of at most {WIDTH}"
    return None


@cache
def _compiled(even: bool) -> Any:
    return torch.compile(flex_attention, dynamic=False if even else None)


@lru_cache(maxsize=128)
def _shifted(score_mod: ScoreMod | None, offset: int) -> ScoreMod | None:
    """The score_mod seeing positions; kept, since each new function object compiles anew."""
    if score_mod is None or offset == 0:
        return score_mod

    def shifted(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, q_idx + offset, kv_idx)

    return shifted
