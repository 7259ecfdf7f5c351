"""What the one query of a step makes of a cache: scores of slots, and its attention row.

    w_j = exp(q·k_j − lse)      lse = log Σ exp(q·k) over all that the cache holds

The slots of the first body are scored one by one; of everything behind it the mass alone is asked.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attlas import ops
from attlas.cache.selection import keys_of, lengths_of
from attlas.ops.reference import grouped_product
from attlas.storage.body import Body
from attlas.storage.layer import StoredLayer
from attlas.storage.rows import Rows


def scores_over(
    body: Body,
    q: Float[Tensor, "batch heads 1 dim"],
    scaling: float,
    stop: int | None = None,
) -> Float[Tensor, "batch heads slots"]:
    """Scaled products with the body's first slots, in float32; −∞ where a slot is empty."""
    keys = keys_of(body, 0, stop).to(q.dtype)
    scores = grouped_product(q * scaling, keys.mT)[:, :, 0].float()
    lengths = lengths_of(body)
    if lengths is None:
        return scores
    each = lengths.repeat_interleave(q.shape[1] // lengths.shape[1], dim=1)
    empty = torch.arange(scores.shape[-1], device=q.device) >= each[..., None]
    return scores.masked_fill(empty, -torch.inf)


def mass_behind(
    layer: StoredLayer,
    q: Float[Tensor, "batch heads 1 dim"],
    scaling: float,
    rows: Rows,
) -> Float[Tensor, "batch heads"]:
    """log Σ exp(q·k) over all that a layer holds behind its first body; −∞ when that is nothing."""
    valid = rows.valid
    visible = None if valid is None else valid[:, None, None].to(q.device)
    behind = layer.segments(visible)[1:]
    if not behind:
        return torch.full(q.shape[:2], -torch.inf, device=q.device)
    return ops.decode(q, behind, scale=scaling)[1][:, :, 0].float()


def weights_over(
    layer: StoredLayer,
    body: Body,
    q: Float[Tensor, "batch heads 1 dim"],
    scaling: float,
    rows: Rows,
) -> Float[Tensor, "batch heads slots"]:
    """Attention weights of a query, which sees all that the layer holds, on the first body's slots."""
    scores = scores_over(body, q, scaling)
    total = torch.logaddexp(scores.logsumexp(-1), mass_behind(layer, q, scaling, rows))
    return (scores - total[..., None]).exp()


def key_bytes(body: Body) -> int:
    """Bytes of the keys of a body in the form in which it holds them."""
    keys: Any = getattr(body.segment(), "k", None)
    return body.nbytes // 2 if keys is None else int(keys.nbytes)
