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
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, causal: bool
) -> str | None:
    """Why no kernel can take a call of `recurrence`, None when one can."""
    if not causal and g is None:
        return "without decays, causal=False is two plain products"
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


def loses(g: Tensor | None, low_rank: tuple[Tensor, Tensor] | None) -> bool:
    """Whether a gradient is wanted that the kernels have only coarsely.

    A head's decay has the sum of what all its tokens' decays have, which cancels more than it adds up,
    while the rounding of each stays. Additive recurrences and delta rules sum over pairs of tokens
    instead; decays beside a low-rank update are those of channels.
    """
    wanted = g is not None and g.ndim == 1 and g.requires_grad and torch.is_grad_enabled()
    return wanted and low_rank is not None


def launch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None, state: Tensor | None, scale: float,
    spans: list[tuple[int, int]], packed: bool, causal: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(outputs, states behind the sequences in float32); no state without `causal`."""
    from attlas.kernels.delta_run import Delta
    from attlas.kernels.low_rank_run import LowRank
    from attlas.kernels.recurrence import Behind, Scan

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
        if not causal and g is not None:
            late = _rows(_late(g, spans))
            out = out + Behind.apply(q, k, v, late, *shape)  # type: ignore[no-untyped-call]
    out = out[..., :width] if spare else out
    return out, after[..., :width] if causal else None


def _late(g: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """In every token's place the decay of the one before; from a token to one behind it, it decays by
    those between and its own, where a sweep backwards counts the other's instead."""
    if g.ndim == 1:
        return g
    own = (0, 0) * (g.ndim - 3)
    return torch.cat([pad(g[:, :, a:b], (*own, 1, -1)) for a, b in spans if b > a], dim=2)


def _rows(x: Tensor) -> Tensor:
    """Channels next to each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()
