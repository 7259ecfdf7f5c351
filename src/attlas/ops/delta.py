"""Delta correction: what sparse attention misses changes slowly from query to query, so it is borrowed.

For the first n − c queries of n, with c = n mod γ + max(tail, γ):

    out_t = sparse_t + (dense_s − sparse_s)      s = γ ⌊t/γ⌋
    out_t = dense_t                              for t = s, and for the last c queries

where dense is full attention of that one query. Cost: (n/γ + c)·n pairs beside those of the sparse
attention. γ = 1 is full attention, and so is a prompt of no more than c tokens.

Source: "Delta Attention: Fast and Accurate Sparse Attention Inference by Delta Correction".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas.errors import at_least_one
from attlas.masks import Mask
from attlas.ops.attend import attend
from attlas.positions.base import ScoreMod

#: Dense queries that are attended to at once: bounds the mask made for them.
ROWS = 256


def delta_correction(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys v_dim"],
    sparse: Float[Tensor, "batch heads queries v_dim"],
    *,
    gamma: int = 64,
    tail: int = 128,
    visible: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    valid: Bool[Tensor, "batch queries"] | None = None,
) -> Float[Tensor, "batch heads queries v_dim"]:
    """The output of any sparse attention, corrected by full attention of every γ-th query.

    Args:
        q: queries; the last stands at the last key.
        k: keys; their heads divide the query heads.
        v: values.
        sparse: what sparse attention gave for these queries.
        gamma: queries from one that is computed densely to the next.
        tail: last queries that are dense, at least; `gamma` and the remainder may add to them.
        visible: what full attention may see; None for causal attention.
        score_mod: pointwise change of the scaled scores.
        scale: of the products; 1/√dim unless given.
        sinks: a logit per head that takes part in the softmax without a value.
        valid: queries that are no padding, which alone are counted; None when all are.

    Raises:
        ValueError: a `gamma` or `tail` below 1.
    """
    chosen = dense_queries(q.shape[2], gamma, tail, valid, q.device)
    slot = (chosen.cumsum(dim=-1) - 1).clamp(min=0)  # the latest dense query serves
    count = int(chosen.sum(dim=-1).max())
    # The dense queries of each row first, in their order; a row with fewer takes others, unused.
    at = (~chosen).byte().sort(dim=-1, stable=True).indices[:, :count].expand(q.shape[0], -1)
    dense = _attended_rows(q, k, v, at, visible, score_mod, scale, sinks)
    delta = dense - _rows(sparse, at)
    slot, chosen = slot.expand(q.shape[0], -1), chosen[:, None, :, None]
    moved = sparse + _rows(delta, slot)
    if valid is not None:
        moved = torch.where(valid[:, None, :, None], moved, sparse)
    return torch.where(chosen, _rows(dense, slot), moved)


def dense_queries(
    queries: int, gamma: int, tail: int, valid: Tensor | None, device: torch.device
) -> Bool[Tensor, "rows queries"]:
    """Which queries are computed densely; one row for all where all are valid."""
    at_least_one("gamma", gamma)
    at_least_one("tail", tail)
    if valid is None:
        valid = torch.ones(1, queries, dtype=torch.bool, device=device)
    number, count = valid.cumsum(dim=-1) - 1, valid.sum(dim=-1, keepdim=True)
    behind = count - count % gamma - max(tail, gamma)
    return valid & ((number % gamma == 0) | (number >= behind))


def attend_with_sinks(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys v_dim"],
    *,
    mask: Mask | Tensor | None,
    score_mod: ScoreMod | None,
    scale: float | None,
    q_offset: int | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads queries v_dim"]:
    """`attend` with logits that take part in the softmax without a value, where there are any."""
    if sinks is None:
        return attend(q, k, v, mask=mask, score_mod=score_mod, scale=scale, q_offset=q_offset)
    heads, lse = attend(
        q, k, v, mask=mask, score_mod=score_mod, scale=scale, q_offset=q_offset, return_lse=True
    )
    return beside_sinks(heads, lse, sinks)


def beside_sinks(
    heads: Float[Tensor, "batch heads queries v_dim"],
    lse: Float[Tensor, "batch heads queries"],
    sinks: Float[Tensor, " heads"] | None,
) -> Float[Tensor, "batch heads queries v_dim"]:
    """Outputs whose softmax logits without a value take part in, where there are any."""
    if sinks is None:
        return heads
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return heads * share[..., None].to(heads.dtype)


def _attended_rows(
    q: Tensor, k: Tensor, v: Tensor, at: Int[Tensor, "batch chosen"], visible: Tensor | None,
    score_mod: ScoreMod | None, scale: float | None, sinks: Tensor | None,
) -> Float[Tensor, "batch heads chosen v_dim"]:  # fmt: skip
    """Full attention of the queries `at`, some at a time, each seeing the keys up to its own."""
    keys = k.shape[2]
    first = keys - q.shape[2]
    found = []
    for rows in at.split(ROWS, dim=1):
        seen, last = visible, keys
        if visible is not None:
            wide = visible.expand(q.shape[0], *visible.shape[1:])
            seen = wide.gather(2, rows[:, None, :, None].expand(-1, wide.shape[1], -1, keys))
        else:
            last = int(rows.max()) + first + 1
            seen = (torch.arange(last, device=q.device) <= rows[..., None] + first)[:, None]
        found.append(
            attend_with_sinks(
                _rows(q, rows), k[:, :, :last], v[:, :, :last], mask=seen,
                score_mod=_at_rows(score_mod, rows + first), scale=scale, q_offset=0, sinks=sinks,
            )
        )  # fmt: skip
    return torch.cat(found, dim=2)


def _at_rows(mod: ScoreMod | None, columns: Int[Tensor, "batch chosen"]) -> ScoreMod | None:
    """A score change for queries that do not follow one another."""
    if mod is None:
        return None

    def moved(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mod(s, b, h, columns[b, q], k)

    return moved


def _rows(x: Tensor, at: Int[Tensor, "batch chosen"]) -> Tensor:
    """x [batch, heads, tokens, dim] at some tokens of each row."""
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
