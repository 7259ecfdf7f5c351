"""Causal attention to lookahead keys by kernels: when they may be taken, and how they are called.

    u_s^t = Σ_{s < j ≤ t} sigmoid(scale · q̃_s·k̃_j) ṽ_j
    out_t = Σ_s softmax_s(scale · q_t·k_s − silu(scale · q_t·u_s^t)) v_s          s ≤ t

Of keys behind a cache, u_s begins with what it was. The equations block by block, for every device and
type, are those of `attlas.layers.heads.castle_lookahead_keys`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.ops.decode_kernels import has_kernels
from attlas.tracing import traced

#: Queries below which a call is not worth a kernel's start; rows and heads that a launch takes.
FEW, PLACES = 16, 65535
#: Channels of a head that kernels take, by the bytes of a number; and what they were cut for, Hopper,
#: whose tensor cores hold wide heads as no older ones do, so that those take narrow ones alone.
WIDTHS = {2: 128, 4: 64}
HOPPER, NARROW = (9, 0), 64
#: Bytes of shared memory that a program takes at most.
SHARED = 160 * 1024
TYPES = (torch.bfloat16, torch.float16, torch.float32)


class LookaheadKeys(NamedTuple):
    """What queries attend to, and how it learns.

    Attributes:
        q: queries, of which the last stands at the last key.
        k: plain keys, cached ones included; their heads divide those of the queries.
        v: values.
        asking: q̃ of each key.
        k_new: k̃ of the queries' own tokens.
        v_new: ṽ of those, 0 at padding.
        u: what the keys before them have learned.
    """

    q: Float[Tensor, "batch heads queries dim"]
    k: Float[Tensor, "batch kv_heads keys dim"]
    v: Float[Tensor, "batch kv_heads keys dim"]
    asking: Float[Tensor, "batch kv_heads keys dim"]
    k_new: Float[Tensor, "batch kv_heads queries dim"]
    v_new: Float[Tensor, "batch kv_heads queries dim"]
    u: Float[Tensor, "batch kv_heads seen dim"]


def lookahead_refuses(given: LookaheadKeys) -> str | None:
    """Why no kernel can take a call, None when one can."""
    q, u = given.q, given.u
    batch, heads, queries, dim = q.shape
    if traced():
        return "tensors stand for others"
    if not all(x.is_cuda for x in given):
        return "not on a CUDA device"
    if q.dtype not in TYPES or any(x.dtype != q.dtype for x in given):
        names = ", ".join(sorted({str(x.dtype) for x in given}))
        return f"numbers are {names}, not of one of {TYPES}"
    if queries < FEW:
        return f"{queries} queries, fewer than {FEW}"
    if u.shape[2] + queries != given.k.shape[2]:
        return f"{u.shape[2]} keys have learned, and {given.k.shape[2]} are there"
    if not 0 < batch * heads <= PLACES:
        return f"{batch * heads} rows and heads, not 1 to {PLACES}"
    if not has_kernels(q.device):
        return "there is no Triton for the device"
    new = torch.cuda.get_device_capability(q.device) >= HOPPER
    most = min(WIDTHS[q.element_size()], WIDTHS[2] if new else NARROW)
    if dim > most:
        return f"heads are {dim} wide, at most {most}"
    device: Any = torch.cuda.get_device_properties(q.device)
    shared = device.shared_memory_per_block_optin
    return f"{shared} bytes of shared memory, not {SHARED}" if shared < SHARED else None


def lookahead_attend(
    given: LookaheadKeys,
    *,
    scale: float,
    plain: Callable[..., tuple[Tensor, Tensor]],
    window: int | None = None,
    valid: Bool[Tensor, "batch keys"] | None = None,
) -> tuple[Float[Tensor, "batch heads queries dim"], Float[Tensor, "batch kv_heads keys dim"]]:
    """(outputs, what all keys have learned), of a call that `lookahead_refuses` no reason against.

    Args:
        given: queries, keys and all else that meets.
        scale: of the products.
        plain: the same of the tensors of `given` by operations that can be differentiated twice, which
            a gradient that is to be differentiated itself goes by.
        window: tokens after its own that update a key; None for all.
        valid: False at padding, which no query sees; None without any.
    """
    from attlas.kernels.lookahead_run import Lookahead

    rows = (x if x.stride(-1) == 1 else x.contiguous() for x in given)
    valid = None if valid is None else valid.contiguous()
    with torch.cuda.device_of(given.q):  # Triton launches on the current device
        found: tuple[Tensor, Tensor] = Lookahead.apply(*rows, valid, scale, window, plain)  # type: ignore[no-untyped-call]
    return found
