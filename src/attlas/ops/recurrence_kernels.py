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
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None
) -> str | None:
    """Why no kernel can take a call of `recurrence`, None when one can."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if not q.is_cuda:
        return "not on a CUDA device"
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all bfloat16"
    if g is not None and not g.is_floating_point():
        return f"log_decay is {g.dtype}"
    if q.shape[-1] > WIDTH:
        return f"keys are {q.shape[-1]} wide, at most {WIDTH}"
    if not q.numel() or not v.shape[-1]:
        return "there is nothing to compute"
    return None if has_kernels(q.device) else "there is no Triton for the device"


def loses(g: Tensor | None) -> bool:
    """Whether a gradient is wanted that the kernels have only coarsely.

    A head's decay has the sum of what all its tokens' decays have, which cancels more than it adds up,
    while the rounding of each to bfloat16 stays.
    """
    return g is not None and g.ndim == 1 and g.requires_grad and torch.is_grad_enabled()


def launch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None, state: Tensor | None, scale: float,
    spans: list[tuple[int, int]], packed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(outputs, states behind the sequences in float32)."""
    from attlas.kernels.delta_run import Delta
    from attlas.kernels.low_rank_run import LowRank
    from attlas.kernels.recurrence import Scan

    if beta is not None and g is not None and g.ndim == 4:  # the delta rule is of low rank, too
        written = beta[..., None] * k
        k, low_rank, beta = written, (-written, g.exp() * k), None
    width = v.shape[-1]
    spare = -width % ALIGNED
    if spare:
        v = pad(v, (0, spare))
        state = None if state is None else pad(state, (0, spare))
    q, k, v = (_rows(x.to(torch.bfloat16)) for x in (q, k, v))
    if g is not None and low_rank is not None:  # of channels, whatever they were of
        g = g[None, :, None] if g.ndim == 1 else g
        g = (g if g.ndim == 4 else g[..., None]).expand(q.shape)
    if g is not None and g.ndim == 4:
        g = _rows(g)
    state = None if state is None else state.float().contiguous()
    shape = (scale, (0, *(stop for _, stop in spans)), packed)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if low_rank is not None:
            a, b = (_rows(x.to(q.dtype)) for x in low_rank)
            found = LowRank.apply(q, k, v, g, a, b, state, *shape)  # type: ignore[no-untyped-call]
        elif beta is not None:
            found = Delta.apply(q, k, v, g, beta, state, *shape)  # type: ignore[no-untyped-call]
        else:
            found = Scan.apply(q, k, v, g, state, *shape)  # type: ignore[no-untyped-call]
    out, after = found
    return (out[..., :width], after[..., :width]) if spare else (out, after)


def _rows(x: Tensor) -> Tensor:
    """Channels next to each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()
