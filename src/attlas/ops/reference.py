"""Attention from its definition, and the two small pieces that every route shares.

    weights = softmax(q kᵀ · scale, hidden pairs at −∞)      out = weights · v
    lse     = log Σ exp(scores)      over the visible keys of a row

A row that sees nothing gives 0 and lse = −∞, and its gradient is 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from attlas.masks import Mask, dense
from attlas.positions.base import ScoreMod


def softmax(scores: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows keys"]:
    """Softmax over keys in which a row of nothing but −∞ gives zeros, with zero gradient."""
    if scores.shape[-1] == 0:
        return scores
    dead = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)


def divided(x: Tensor, total: Tensor) -> Tensor:
    """x / total; where a total is 0, as a row's that sees nothing, x itself."""
    return x / total.masked_fill(total == 0, 1.0)


def merge(
    parts: list[tuple[Float[Tensor, "*rows dim"], Float[Tensor, "*rows"]]],
) -> tuple[Float[Tensor, "*rows dim"], Float[Tensor, "*rows"]]:
    """Attention over the union of disjoint sets of keys, from (out, lse) over each, exactly.

        lse = log Σ_i exp(lse_i)        out = Σ_i exp(lse_i − lse) · out_i

    Raises:
        ValueError: no parts.
    """
    if not parts:
        raise ValueError("merge takes at least one (out, lse)")
    each = torch.stack([lse for _, lse in parts])
    shares = softmax(each.movedim(0, -1)).movedim(-1, 0)[..., None]
    if each.requires_grad:  # where no part sees anything its gradient would be that of −∞ − (−∞)
        dead = each.amax(0) == -torch.inf
        lse = torch.logsumexp(each.masked_fill(dead, 0.0), 0).masked_fill(dead, -torch.inf)
    else:
        lse = torch.logsumexp(each, 0)
    # One after the other: side by side they would take the memory of all outputs again, twice.
    total = shares[0] * parts[0][0]
    for share, (out, _) in zip(shares[1:], parts[1:], strict=True):
        total = torch.addcmul(total, share, out.to(total.dtype))
    return total.to(parts[0][0].dtype), lse


def scores_of(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    *,
    scale: float,
    mask: Mask | Tensor | None,
    score_mod: ScoreMod | None,
    q_offset: int,
) -> Float[Tensor, "batch heads queries keys"]:
    """Scaled products with the change of scores applied and hidden pairs at −∞."""
    scores = grouped_product(q * scale, k.transpose(-1, -2))
    if score_mod is not None:
        scores = score_mod(scores, *indices(scores, q_offset))
    visible = as_dense(mask, q.shape[2], k.shape[2], q_offset, q.device)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def reference(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch v_heads keys v_dim"],
    *,
    scale: float,
    mask: Mask | Tensor | None = None,
    score_mod: ScoreMod | None = None,
    dropout: float = 0.0,
    q_offset: int = 0,
) -> tuple[Float[Tensor, "batch heads queries v_dim"], Float[Tensor, "batch heads queries"]]:
    """(out, lse) by the definition, with all scores in memory at once."""
    scores = scores_of(q, k, scale=scale, mask=mask, score_mod=score_mod, q_offset=q_offset)
    weights = torch.dropout(softmax(scores), dropout, train=dropout > 0)
    return grouped_product(weights, v), torch.logsumexp(scores, -1)


def indices(scores: Tensor, q_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(b, h, q_idx, kv_idx) that broadcast to scores [batch, heads, queries, keys]."""
    batch, heads, queries, keys = scores.shape
    steps = [torch.arange(n, device=scores.device) for n in (batch, heads, queries, keys)]
    return (
        steps[0][:, None, None, None], steps[1][:, None, None],
        steps[2][:, None] + q_offset, steps[3],
    )  # fmt: skip


def as_dense(
    mask: Mask | Tensor | None, q_len: int, k_len: int, q_offset: int, device: torch.device
) -> Bool[Tensor, "b h queries keys"] | None:
    """Any mask as booleans that broadcast to [batch, heads, queries, keys]."""
    if isinstance(mask, Mask):
        return dense(mask, q_len, k_len, q_offset=q_offset, device=device)
    return mask


def grouped_product(
    a: Float[Tensor, "batch heads rows inner"], b: Float[Tensor, "batch kv_heads inner columns"]
) -> Float[Tensor, "batch heads rows columns"]:
    """a @ b, each group's heads folded into rows, so that what they share is read once."""
    if a.shape[1] == b.shape[1]:
        return a @ b
    folded = a.unflatten(1, (b.shape[1], -1))
    if a.is_cuda and a.shape[2] == 1:
        # A product of two to eight rows is there ten times as slow as one of a single row.
        each = [folded[:, :, i] @ b for i in range(folded.shape[2])]
        return torch.stack(each, dim=2).flatten(1, 2)
    product: Tensor = (folded.flatten(2, 3) @ b).unflatten(2, folded.shape[2:4])
    return product.flatten(1, 2)


def repeated(x: Shaped[Tensor, "batch kv_heads keys *dim"], heads: int) -> Tensor:
    """What each key head has, repeated so that each query head of a group has its own."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def taken(x: Shaped[Tensor, "batch heads tokens width"], at: Int[Tensor, "batch list_heads n"]) -> Tensor:
    """Rows `at` of x, whose heads are repeated where a list is one of query heads."""
    row = torch.arange(x.shape[0], device=x.device)[:, None, None]
    head = torch.arange(at.shape[1], device=x.device) // (at.shape[1] // x.shape[1])
    return x[row, head[:, None], at.long()]
