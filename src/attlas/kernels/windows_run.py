"""Calls of the kernels for attention in short windows, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from attlas.kernels.decode import units
from attlas.kernels.windows import _backward, _forward

#: Channels of a tile at most.
CHANNELS = 32
#: Programs that a multiprocessor gets in a backward pass that sums over windows.
PROGRAMS = 8


class Windows(torch.autograd.Function):
    """Attention of q, k, v [rows, heads, tokens, width], with bias [heads, tokens, tokens] and mask
    [windows, tokens, tokens] in numbers that are added, contiguous; row r has mask r modulo windows.

    `plain` is the same from its definition, which gives gradients that are themselves differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float,
        plain: Callable[..., Tensor],
    ) -> Tensor:  # fmt: skip
        """The outputs; only what was given is kept."""
        ctx.save_for_backward(q, k, v, bias, mask)
        ctx.scale, ctx.plain = scale, plain
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        _forward[q.shape[0], q.shape[1]](
            q, k, v, q if bias is None else bias, q if mask is None else mask, out, q.shape[2],
            1 if mask is None else len(mask), scale, *_strides(q, k, v, out),
            **_fixed(q, v, bias, mask),
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and bias."""
        q, k, v, bias, mask = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will itself be differentiated
            leaves = [q, k, v] if bias is None else [q, k, v, bias]
            out = ctx.plain(q, k, v, bias, mask, ctx.scale)
            grads = torch.autograd.grad(out, leaves, d_out, create_graph=True)
            return *grads, *[None] * (7 - len(grads))
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        sums = bias is not None and ctx.needs_input_grad[3]
        (rows, heads, tokens, _), count = q.shape, q.shape[0]
        if sums:
            count = min(rows, max(1, PROGRAMS * units(q.device) // heads))
        made = [torch.empty_like(x) for x in (q, k, v)]
        parts = q.new_empty((count, heads, tokens, tokens) if sums else (1,), dtype=torch.float32)
        _backward[count, heads](
            q, k, v, q if bias is None else bias, q if mask is None else mask, d_out, *made, parts, rows,
            tokens, 1 if mask is None else len(mask), ctx.scale, *_strides(q, k, v, d_out, *made),
            **_fixed(q, v, bias, mask), SUMS=sums,
        )  # fmt: skip
        d_bias = parts.sum(0).to(bias.dtype) if sums else None
        return *made, d_bias, None, None, None


def _strides(*tensors: Tensor) -> list[int]:
    """Of rows, heads and tokens; channels lie behind one another."""
    return [n for x in tensors for n in x.stride()[:3]]


def _fixed(q: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
    """What a kernel is compiled for."""
    width, room = max(q.shape[3], v.shape[3]), max(16, triton.next_power_of_2(q.shape[2]))
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "dk": q.shape[3], "dv": v.shape[3], "N": room,
        "D": min(CHANNELS, max(16, triton.next_power_of_2(width))), "BIAS": bias is not None,
        "MASK": mask is not None, "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 4 if room <= 64 else 8, "num_stages": 1,
    }  # fmt: skip
