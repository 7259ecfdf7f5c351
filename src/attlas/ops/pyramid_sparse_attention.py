"""Pyramid sparse attention: a block of keys is read whole, averaged over 2, 4 or 8 tokens, or not at all.

    out_i = softmax over all kept blocks b of [q_i · k̃ · scale + log l_b] ṽ
    k̃, ṽ: means of l_b neighbouring keys, values    l_b = min(cap_b, level of b's rank) ∈ {0, 1, 2, 4, 8}

Blocks are ranked by importance: from each block a quarter of the tokens is drawn, and of their exact
weights the largest of each pair of blocks counts, as a share of its row. By quota, level l goes to the
ranks up to `ends[l]` of the blocks that may be seen; by threshold, to those whose importances sum up to
`ends[l]` (and one more). The cap keeps unlike keys apart: means of 2, 4, 8 are allowed where the cosine
of the first and the last of so many exceeds a threshold on average.

Blocks that a mask cuts, as on the diagonal, are read whole, and so is the first one where the future is
hidden; a mean of fewer tokens, at the end, adds the log of their number. One level is one
`ops.block_sparse`, and all are merged exactly.

Cost: Σ 1/l of the pairs of blocks; the ranking n² / 16 products. Memory: what `block_sparse` takes.
Reduces to exact attention with ends {1: 1.0}.
Source: "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.catalog.kinds import OP
from attlas.catalog.registry import mechanism
from attlas.errors import UnknownName, at_least_one
from attlas.masks import Mask, at, grid
from attlas.ops.block_reference import as_lists
from attlas.ops.block_sparse import hides_future, listed
from attlas.ops.exact import exact, wide
from attlas.ops.reference import divided, grouped_product, merge, repeated, softmax
from attlas.tracing import traced

LEVELS = (1, 2, 4, 8)
#: Where each level ends, and how like keys must be to be averaged, as the authors ran video models.
ENDS = {1: 0.4, 2: 0.5, 4: 0.6, 8: 0.8}
SIMILAR = (0.7, 0.65, 0.6)

By = Literal["quota", "threshold"]


@mechanism("pyramid-sparse-attention", kind=OP)
def pyramid_sparse_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys v_dim"],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    levels: Int[Tensor, "batch heads q_blocks k_blocks"] | None = None,
    ends: Mapping[int, float] = ENDS,
    by: By = "threshold",
    least: float = 0.06,
    similar: tuple[float, float, float] = SIMILAR,
    q_block: int = 128,
    k_block: int = 128,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "batch heads queries v_dim"], Float[Tensor, "batch heads queries"]]:
    """(out, lse) of attention to keys at several resolutions; differentiable in q, k and v.

    The levels are chosen without gradient. Each block of queries meets at least the block of keys that
    is most important to it. Rows that see nothing give 0, lse −∞.

    Args:
        q: queries.
        k: keys; their heads divide the query heads.
        v: values.
        mask: a pattern; blocks that it cuts are read whole.
        scale: of the products; 1/√dim unless given.
        q_offset: position of the first query; `keys - queries` unless given.
        levels: 0, 1, 2, 4 or 8 for each pair of blocks; chosen unless given.
        ends: of each level, a share of the ranks or of all importance; the rest is skipped.
        by: "quota" for ranks, "threshold" for importance.
        least: share of the ranks that are read whole at least, by threshold.
        similar: cosines above which means of 2, 4 and 8 are allowed.
        q_block: queries of a block.
        k_block: keys of a block.
        generator: of the tokens that are drawn to rank blocks.

    Raises:
        ValueError: levels that are not offered or of another shape, ends outside 0..1, `by` that is not
            offered, blocks of keys that 8 does not divide, heads that do not divide.
        TypeError: a mask that is no pattern.
    """
    queries, keys = q.shape[2], k.shape[2]
    _check(q, k, mask, levels, ends, by, q_block, k_block)
    offset = keys - queries if q_offset is None else q_offset
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if keys == 0 or queries == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), wide(q.new_full(q.shape[:3], -torch.inf))
    if levels is None:
        levels = chosen_levels(
            q, k, mask=mask, scale=scale, q_offset=offset, ends=ends, by=by, least=least, similar=similar,
            q_block=q_block, k_block=k_block, generator=generator,
        )  # fmt: skip
    else:
        some, every = _seen(mask, queries, keys, q_block, k_block, offset, q.device)
        levels = torch.where(every, levels, some.to(levels.dtype))
    parts = []
    for level in LEVELS:
        chosen = levels == level
        if level > 1 and not traced() and not chosen.any():
            continue
        pooled_k, pooled_v, bias = pooled(k, level), pooled(v, level), None
        if level > 1:
            first = torch.arange(0, keys, level, device=k.device)
            bias = (keys - first).clamp(max=level).to(wide(q).dtype).log()[None, None]
        parts.append(
            listed(
                q, pooled_k, pooled_v, as_lists(chosen), (q_block, k_block // level),
                mask if level == 1 else None, bias, scale=scale, q_offset=offset if level == 1 else 0,
            )
        )  # fmt: skip
    return merge(parts)


@torch.no_grad()
def chosen_levels(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    *,
    mask: Mask | None,
    scale: float,
    q_offset: int,
    ends: Mapping[int, float],
    by: By,
    least: float,
    similar: tuple[float, float, float],
    q_block: int,
    k_block: int,
    generator: torch.Generator | None,
) -> Int[Tensor, "batch heads q_blocks k_blocks"]:
    """The level of each pair of blocks, whose inverse is its share of the pairs that are computed."""
    some, every = _seen(mask, q.shape[2], k.shape[2], q_block, k_block, q_offset, q.device)
    found = importance(
        q, k, q_block, k_block, mask=mask, scale=scale, q_offset=q_offset, generator=generator
    )
    found = found.masked_fill(~some, -1.0)
    levels = ranked(found, ends, by, least=least, counts=some.sum(-1).expand(found.shape[:3]))
    cap = repeated(largest_pool(k, k_block, similar), q.shape[1])
    levels = torch.minimum(levels, cap[:, :, None])
    column = torch.arange(k.shape[2] // k_block + (k.shape[2] % k_block > 0), device=q.device)
    none = (levels == 0).all(-1, keepdim=True)
    whole = ~every | none & (column == found.argmax(-1, keepdim=True))
    if hides_future(mask):
        whole = whole | (column == 0)
    return torch.where(whole, some.to(levels.dtype), levels)


def pooled(x: Float[Tensor, "batch heads tokens dim"], level: int) -> Float[Tensor, "b h means dim"]:
    """Means of `level` neighbours, the last of those that are left."""
    if level == 1:
        return x
    first = torch.arange(0, x.shape[2], level, device=x.device)
    count = (x.shape[2] - first).clamp(max=level)[:, None]
    whole = torch.nn.functional.pad(wide(x), (0, 0, 0, -x.shape[2] % level))
    means: Tensor = whole.unflatten(2, (-1, level)).sum(3) / count
    return means.to(x.dtype)


@exact
def importance(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    q_block: int,
    k_block: int,
    *,
    mask: Mask | None,
    scale: float,
    q_offset: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch heads q_blocks k_blocks"]:
    """The largest weight of each pair of blocks among a quarter of their tokens, as a share of its row.

    The same places of every block are drawn, for all heads; a token that misses in the last block is its
    last one again.
    """
    at_q = _drawn(q.shape[2], q_block, generator, q.device)
    at_k = _drawn(k.shape[2], k_block, generator, k.device)
    rows, columns = at_q.flatten(), at_k.flatten()
    scores = grouped_product(wide(q[:, :, rows]) * scale, wide(k[:, :, columns]).mT)
    if mask is not None:
        scores = scores.masked_fill(~at(mask, rows + q_offset, columns), -torch.inf)
    weights = softmax(scores).unflatten(-1, at_k.shape).unflatten(2, at_q.shape).amax((3, 5))
    return divided(weights, weights.sum(-1, keepdim=True))


def _drawn(
    tokens: int, block: int, generator: torch.Generator | None, device: torch.device
) -> Int[Tensor, "blocks drawn"]:
    kind = "cpu" if generator is None else generator.device
    places = torch.rand(block, generator=generator, device=kind).topk(max(1, block // 4)).indices
    first = torch.arange(0, tokens, block, device=device)
    return (first[:, None] + places.to(device)).clamp(max=tokens - 1)


def ranked(
    importance: Float[Tensor, "batch heads q_blocks k_blocks"],
    ends: Mapping[int, float],
    by: By,
    *,
    least: float,
    counts: Int[Tensor, "batch heads q_blocks"] | None = None,
) -> Int[Tensor, "batch heads q_blocks k_blocks"]:
    """The level of each block by its rank; `counts` are the blocks that may be seen, all unless given."""
    values, order = importance.sort(dim=-1, descending=True, stable=True)
    if counts is None:
        counts = torch.full(values.shape[:-1], values.shape[-1], device=values.device)
    energy = values.clamp(min=0).cumsum(-1)
    share = divided(energy, energy[..., -1:])
    rank = torch.arange(values.shape[-1], device=values.device)
    levels, before = torch.zeros_like(order), torch.zeros_like(counts)
    for level, end in sorted(ends.items(), key=lambda item: item[1]):
        if by == "quota":
            stop = (counts.double() * end).long()
        else:
            within = (share <= end + 1e-6).sum(-1)
            stop = torch.where(within > 0, within + 1, before)
            if level == 1:
                stop = torch.maximum(stop, (counts.double() * least).long() + 1)
        stop = torch.maximum(torch.minimum(stop, counts), before)
        own = (rank >= before[..., None]) & (rank < stop[..., None])
        levels, before = torch.where(own, level, levels), stop
    return torch.zeros_like(levels).scatter(-1, order, levels)


def largest_pool(
    k: Float[Tensor, "batch heads keys dim"], block: int, similar: tuple[float, float, float]
) -> Int[Tensor, "batch heads blocks"]:
    """How many neighbours of a block may be averaged: 8, 4, 2 or 1; the last key fills what misses."""
    missing = -k.shape[2] % block
    last = k[:, :, -1:].expand(-1, -1, missing, -1)
    blocks = wide(torch.cat((k, last), dim=2)).unflatten(2, (-1, block))
    found = torch.ones(blocks.shape[:3], dtype=torch.long, device=k.device)
    for level, threshold in zip(LEVELS[1:], similar, strict=True):
        ends = blocks.unflatten(3, (-1, level))
        cosine = torch.cosine_similarity(ends[..., 0, :], ends[..., -1, :], dim=-1).mean(-1)
        found = torch.where(cosine > threshold, level, found)
    return found


def _seen(
    mask: Mask | None, queries: int, keys: int, q_block: int, k_block: int, offset: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(some, every) pair of each pair of blocks may be seen."""
    if mask is None:
        shape = (1, 1, -(-queries // q_block), -(-keys // k_block))
        every = torch.ones(shape, dtype=torch.bool, device=device)
        return every, every
    return grid(
        mask, queries, keys, q_block=q_block, k_block=k_block, q_offset=offset, device=device
    )


def _check(
    q: Tensor, k: Tensor, mask: object, levels: Tensor | None, ends: Mapping[int, float], by: str,
    q_block: int, k_block: int,
) -> None:  # fmt: skip
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"mask takes a pattern, got {type(mask).__name__}")
    if by not in ("quota", "threshold"):
        raise UnknownName("by", by, ("quota", "threshold"))
    at_least_one("q_block", q_block)
    if at_least_one("k_block", k_block) % LEVELS[-1]:
        raise ValueError(f"k_block takes a multiple of {LEVELS[-1]}, got {k_block}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, which do not divide the {q.shape[1]} of q")
    if not ends or not all(at in (0, *LEVELS) and 0 <= end <= 1 for at, end in ends.items()):
        raise ValueError(f"ends takes shares of 0..1 for levels of 0, 1, 2, 4 and 8, got {dict(ends)}")
    shape = (*q.shape[:2], -(-q.shape[2] // q_block), -(-k.shape[2] // k_block))
    if levels is None:
        return
    if levels.shape != shape:
        raise ValueError(f"levels takes {list(shape)}, got {list(levels.shape)}")
    if not traced() and not torch.isin(levels, levels.new_tensor((0, *LEVELS))).all():
        raise ValueError("levels takes 0, 1, 2, 4 and 8")
