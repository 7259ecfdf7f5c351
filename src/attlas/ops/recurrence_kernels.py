"""When the kernels of recurrences may be taken, and how they are called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attlas.ops.decode_kernels import has_kernels

#: Width of keys that the kernel takes.
WIDTH = 128
#: Columns of values come in multiples of this, so that rows begin where wide loads may.
ALIGNED = 8


def refuses(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, low_rank: bool
) -> str | None:
    """Why no kernel can take a call of `recurrence`, None when one can."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if not q.is_cuda:
        return "not on a CUDA device"
    if low_rank:
        return "no kernel has a low-rank update"
    if beta is not None and g is not None and g.ndim == 4:
        return "no kernel has the delta rule with a decay of channels"
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all bfloat16"
    if g is not None and not g.is_floating_point():
        return f"log_decay is {g.dtype}"
    if q.shape[-1] > WIDTH:
        return f"keys are {q.shape[-1]} wide, at most {WIDTH}"
    if not q.numel() or not v.shape[-1]:
        return "there is nothing to compute"
    return None if has_kernels(q.device) else "there is no Triton for the device"


def launch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None,
    scale: float, spans: list[tuple[int, int]], packed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(outputs, states behind the sequences in float32)."""
    from attlas.kernels.delta_run import Delta
    from attlas.kernels.recurrence import Scan

    width = v.shape[-1]
    spare = -width % ALIGNED
    if spare:
        v = pad(v, (0, spare))
        state = None if state is None else pad(state, (0, spare))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if g is not None and g.stride(-1) != 1 and g.ndim == 4:
        g = g.contiguous()
    state = None if state is None else state.float().contiguous()
    offsets = (0, *(stop for _, stop in spans))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        update, written = (Scan, ()) if beta is None else (Delta, (beta,))
        given = (q, k, v, g, *written, state, scale, offsets, packed)
        out, after = update.apply(*given)  # type: ignore[no-untyped-call, unused-ignore]
    return (out[..., :width], after[..., :width]) if spare else (out, after)
