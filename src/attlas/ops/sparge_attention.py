"""SpargeAttention: blocks of keys are left out before the scores, and products with values after them.

    ŝ_ij = softmax_j(mean(Q_i) · mean(K_j − k̄) · scale)    sim(X) = mean of the cosines of its tokens
    map_i = the largest ŝ_ij that sum up to `mass`, and all j with sim(K_j) ≤ `similar`;
            every j where sim(Q_i) ≤ `similar`
    P_ij V_j is left out where, for all rows of a group, max_j s_ij ≤ m_i − skip      (m: running maximum)

A mean stands for its block only where the tokens are alike, others are read whole; so are last blocks
that are not full. `skip` is in powers of two, and a group the queries of one warp. Where what is skipped
is too small for the type of the output to show, the sum is left to `ops.block_sparse`.

Cost: the blocks of the map. With skips that show, or scores in 8 bits, the plain form here goes over all
blocks of keys, and is no faster than exact attention.
Reduces to exact attention with mass 1 and skip None.
Source: "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference".
"""

from __future__ import annotations

from math import e, log, log2
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.catalog.kinds import OP
from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one, exactly_one
from attlas.masks import Mask, at, grid
from attlas.ops.block_reference import as_lists
from attlas.ops.block_sparse import listed
from attlas.ops.exact import exact, wide
from attlas.ops.reference import divided, grouped_product, repeated, softmax
from attlas.ops.sage_attention import quantise


@mechanism("sparge-attention", kind=OP)
@exact
def sparge_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys v_dim"],
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    mass: float | Float[Tensor, " heads"] | None = 0.98,
    share: float | Float[Tensor, " heads"] | None = None,
    similar: float | Float[Tensor, " heads"] = 0.6,
    skip: float | None = 50.0,
    bits: Literal[8] | None = None,
    sink: bool = False,
    q_block: int = 128,
    k_block: int = 64,
    rows: int = 32,
) -> tuple[Float[Tensor, "batch heads queries v_dim"], Float[Tensor, "batch heads queries"]]:
    """(out, lse) of attention to the blocks that matter; differentiable but in 8 bits.

    Rows that see nothing give 0, lse −∞.

    Args:
        q: queries.
        k: keys; their heads divide the query heads.
        v: values.
        mask: a pattern.
        scale: of the products; 1/√dim unless given.
        q_offset: position of the first query; `keys - queries` unless given.
        mass: of the means' softmax that is read, of all heads or each; 1 reads all.
        share: of the blocks that is read, instead of `mass`.
        similar: mean cosine above which a mean stands for its block.
        skip: powers of two below the running maximum from which on weights are left out.
        bits: 8 for scores of integers, one scale a block.
        sink: read the first block always.
        q_block: queries of a block.
        k_block: keys of a block.
        rows: queries that skip together.

    Raises:
        TypeError: a mask that is no pattern.
        ValueError: mass and share both or neither, a negative skip, bits that are not offered or wanted
            with gradients, sizes below 1, heads that do not divide.
    """
    _check(q, k, v, mask, skip, bits, rows)
    queries, keys = q.shape[2], k.shape[2]
    offset = keys - queries if q_offset is None else q_offset
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    smooth = wide(k) - wide(k).mean(2, keepdim=True)
    with torch.no_grad():
        chosen = block_map(
            q, smooth, mask=mask, scale=scale, q_offset=offset, mass=mass, share=share, similar=similar,
            sink=sink, q_block=q_block, k_block=k_block,
        )  # fmt: skip
    if keys == 0 or queries == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), wide(q.new_full(q.shape[:3], -torch.inf))
    seen = log2(keys / torch.finfo(q.dtype).eps)
    if bits is None and (skip is None or skip > seen):
        return listed(
            q, k, v, as_lists(chosen), (q_block, k_block), mask, scale=scale, q_offset=offset
        )
    factor = scale * log2(e)
    common: float | Tensor = 0.0
    if bits is None:
        ours, theirs = wide(q) * factor, wide(k)
    else:  # integers of smoothed keys, whose mean the sum of exponentials sees
        left, right = quantise(wide(q) * factor, bits, q_block), quantise(smooth, bits, k_block)
        ours, theirs = (x.codes * x.each[..., None] for x in (left, right))
        common = grouped_product(wide(q), (wide(k) - smooth)[:, :, :1].mT)[..., 0] * scale
    out, lse = _skipping(ours, theirs, wide(v), chosen, mask, offset, skip, (q_block, k_block), rows)
    return out.to(q.dtype), lse + common


@exact
def block_map(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    *,
    mask: Mask | None,
    scale: float,
    q_offset: int,
    mass: float | Tensor | None,
    share: float | Tensor | None,
    similar: float | Tensor,
    sink: bool,
    q_block: int,
    k_block: int,
) -> Bool[Tensor, "batch heads q_blocks k_blocks"]:
    """The blocks of keys that each block of queries reads."""
    exactly_one("sparge-attention", mass=mass, share=share)
    at_least_one("q_block", q_block)
    at_least_one("k_block", k_block)
    heads = q.shape[1]
    q_mean, q_cosine = means(q, q_block)
    k_mean, k_cosine = (repeated(x, heads) for x in means(k, k_block))
    q_alike = (q_cosine > _each(similar, q)[..., 0])[..., None]
    k_alike = (k_cosine > _each(similar, q)[..., 0])[:, :, None]
    some = torch.ones(1, 1, q_alike.shape[2], k_alike.shape[3], dtype=torch.bool, device=q.device)
    if mask is not None:
        some, _ = grid(
            mask, q.shape[2], k.shape[2], q_block=q_block, k_block=k_block, q_offset=q_offset,
            device=q.device,
        )  # fmt: skip
    scores = (q_mean @ k_mean.mT * scale).masked_fill(~(k_alike & some), -torch.inf)
    values, order = softmax(scores).sort(dim=-1, descending=True, stable=True)
    blocks = values.shape[-1]
    if mass is not None:
        limit = _each(mass, q)
        count = torch.where(limit >= 1, blocks, (values.cumsum(-1) <= limit).sum(-1, keepdim=True))
    else:
        assert share is not None
        count = (_each(share, q) * blocks).long()
    first = torch.arange(blocks, device=q.device) < count.clamp(min=1)
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, first.expand(values.shape))
    chosen = chosen | ~k_alike | ~q_alike
    if sink:
        chosen = chosen | (torch.arange(blocks, device=q.device) == 0)
    return chosen & some


def means(
    x: Float[Tensor, "batch heads tokens dim"], block: int
) -> tuple[Float[Tensor, "batch heads blocks dim"], Float[Tensor, "batch heads blocks"]]:
    """The mean of each block, and the mean of all its cosines; −∞ of one that is not full."""
    x, missing = wide(x), -x.shape[2] % block
    unit = divided(x, x.norm(dim=-1, keepdim=True))
    sums, units = (
        torch.nn.functional.pad(t, (0, 0, 0, missing)).unflatten(2, (-1, block)).sum(3) for t in (x, unit)
    )
    first = torch.arange(0, x.shape[2], block, device=x.device)
    count = (x.shape[2] - first).clamp(max=block)
    cosines = (units / block).square().sum(-1).masked_fill(count < block, -torch.inf)
    return sums / count[:, None], cosines


def _skipping(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, mask: Mask | None, offset: int, skip: float | None,
    size: tuple[int, int], rows: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of scores to base 2, block of keys by block."""
    row = torch.arange(q.shape[2], device=q.device)
    block = row // size[0]
    group = block * -(-size[0] // rows) + row % size[0] // rows
    top = q.new_full(q.shape[:3], -torch.inf)
    total, summed = torch.zeros_like(top), q.new_zeros(*q.shape[:3], v.shape[3])
    for number, start in enumerate(range(0, k.shape[2], size[1])):
        run = slice(start, min(start + size[1], k.shape[2]))
        visible = chosen[:, :, block, number, None]
        if mask is not None:
            column = torch.arange(run.start, run.stop, device=q.device)
            visible = visible & at(mask, row + offset, column)
        scores = grouped_product(q, k[:, :, run].mT).masked_fill(~visible, -torch.inf)
        highest = scores.detach().amax(-1)
        if skip is not None:
            near = highest > torch.where(top == -torch.inf, top, top - skip)
            kept = near.new_zeros(*near.shape[:2], int(group.max()) + 1, dtype=torch.int32)
            kept = kept.index_add(2, group, near.to(torch.int32))[:, :, group] > 0
            scores = scores.masked_fill(~kept[..., None], -torch.inf)
        higher = torch.maximum(top, highest)
        # A row that has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
        base = higher.masked_fill(higher == -torch.inf, 0.0)
        weights, shrink = (scores - base[..., None]).exp2(), (top - base).exp2()
        total = total * shrink + weights.sum(-1)
        summed = summed * shrink[..., None] + grouped_product(weights, v[:, :, run])
        top = higher
    return divided(summed, total[..., None]), (top + total.log2()) * log(2)


def _each(x: float | Tensor, q: Tensor) -> Tensor:
    """A number for all heads or for each, [heads or 1, 1, 1]."""
    return torch.as_tensor(x, dtype=torch.float64, device=q.device).to(wide(q).dtype).view(-1, 1, 1)


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: object, skip: float | None, bits: int | None, rows: int
) -> None:
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"mask takes a pattern, got {type(mask).__name__}")
    if skip is not None and skip < 0:
        raise ValueError(f"skip must be at least 0, got {skip}")
    if bits not in (8, None):
        raise ValueError(f"bits takes 8 or None, got {bits!r}")
    if bits is not None and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("bits=8 takes no inputs that want a gradient, which rounded numbers have not")
    at_least_one("rows", rows)
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, which do not divide the {q.shape[1]} of q")
