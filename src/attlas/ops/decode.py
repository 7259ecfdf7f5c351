"""`decode`: a few queries attend to all that a cache holds, however it is held.

    out_i, lse_i = attention over segment i          out = merge of all (out_i, lse_i)

Keys and values are read once, in the form in which they are held: quantised numbers become numbers
block by block, listed pages alone are read, and nothing is repeated for grouped heads.

| route     | takes it when                                                                     |
|-----------|-----------------------------------------------------------------------------------|
| reference | always: blocks of slots, one after the other                                        |
| triton    | on a GPU, a few queries, half precision: one kernel a segment, cut to fill the device |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attlas.errors import UnknownName
from attlas.ops.reference import grouped_product, merge, softmax
from attlas.ops.segments import Dense, Segment

ROUTES = ("auto", "reference", "triton")
#: Numbers of keys that the reference makes of codes or gathers at once: 16 MiB in float32.
AT_ONCE = 2**22
#: Scores of dense keys held at once: 128 MiB in float32.
SCORES = 2**25


def decode(
    q: Float[Tensor, "batch heads queries dim"],
    segments: Sequence[Segment],
    *,
    scale: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    route: Literal["auto", "reference", "triton"] = "auto",
) -> tuple[Float[Tensor, "batch heads queries v_dim"], Float[Tensor, "batch heads queries"]]:
    """(out, lse) of attention over the union of the segments.

    Args:
        q: queries, few of them: one while decoding, a handful for a question.
        segments: what the cache holds (`attlas.ops.segments`).
        scale: of the products; 1/√dim unless given.
        sinks: a logit per head that takes part in the softmax without a value.
        route: "auto", or one route by name.

    A query that sees nothing gives 0 and lse = −∞.

    Raises:
        ValueError: no segment, an unknown route, or a route that cannot take the call.
    """
    if not segments:
        raise ValueError("decode takes at least one segment, got none")
    if route not in ROUTES:
        raise UnknownName("route", route, ROUTES)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if route != "reference":
        from attlas.ops.decode_kernels import launch, refuses

        reason = refuses(q, segments)
        if reason is None:
            out, lse = launch(q, segments, scale)
        elif route == "triton":
            raise ValueError(f"route='triton' cannot take this call: {reason}")
        else:
            out, lse = reference_decode(q, segments, scale)
    else:
        out, lse = reference_decode(q, segments, scale)
    if sinks is None:
        return out, lse
    logit = sinks.to(lse.dtype)[:, None]
    return out * torch.sigmoid(lse - logit)[..., None].to(out.dtype), torch.logaddexp(lse, logit)


def reference_decode(q: Tensor, segments: Sequence[Segment], scale: float) -> tuple[Tensor, Tensor]:
    """Blocks of slots, merged."""
    batch, heads, queries, dim = q.shape
    gathered = max(64, AT_ONCE // max(1, batch * heads * max(dim, queries)))
    # Dense keys lie there as they are used, so that only their scores take memory.
    dense = max(gathered, SCORES // max(1, batch * heads * queries))
    parts = [
        _attended(q, k, v, seen, bias, scale)
        for segment in segments
        for k, v, seen, bias in segment.blocks(
            queries, dense if isinstance(segment, Dense) else gathered
        )
        if k.shape[2]
    ]
    if not parts:
        return q.new_zeros(*q.shape[:3], dim), q.new_full(q.shape[:3], -torch.inf)
    return parts[0] if len(parts) == 1 else merge(parts)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)  # half precision is too coarse to merge by
    if seen is None and bias is None and _fused_on_cpu(q, k, v):
        # A group's heads are rows of one product, so that the keys they share are read once.
        rows = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, k, v, 0.0, False, scale=scale
        )
        return out.reshape(*q.shape[:3], v.shape[-1]), lse.reshape(q.shape[:3]).to(exact)
    scores = grouped_product(q * scale, k.to(q.dtype).transpose(-1, -2)).to(exact)
    if bias is not None:
        scores = scores + _for_queries(bias.to(scores.dtype)[:, :, None], q.shape[1])
    if seen is not None:
        scores = scores.masked_fill(~_for_queries(seen, q.shape[1]), -torch.inf)
    return grouped_product(softmax(scores).to(q.dtype), v.to(q.dtype)), torch.logsumexp(scores, -1)


def _fused_on_cpu(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether SDPA's CPU kernel, which gives the lse too, can take these: twice as fast as products."""
    alike = q.device.type == "cpu" and k.dtype == v.dtype == q.dtype and k.shape[-1] == v.shape[-1]
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return alike and not trains and k.stride(-1) == v.stride(-1) == 1


def _for_queries(x: Tensor, heads: int) -> Tensor:
    """A mask or bias of key heads for query heads."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], dim=1)
