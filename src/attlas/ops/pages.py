"""Pages of keys: summaries, what a query can at most gain from a page, and the best pages.

    low, high = elementwise minimum and maximum over a page's keys
    bound     = Σ_d max(q_d · low_d, q_d · high_d)  ≥  q · k   for every key k of the page
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from attlas.errors import at_least_one

#: Pages so few, and rows so many, that the best are found one after the other.
FEW, MANY = 8, 1024


def page_bounds(
    k: Float[Tensor, "batch kv_heads tokens dim"], page: int
) -> tuple[Float[Tensor, "batch kv_heads pages dim"], Float[Tensor, "batch kv_heads pages dim"]]:
    """(low, high) of each page of keys; the last page may hold fewer tokens.

    Raises:
        ValueError: a page below 1.
    """
    at_least_one("page", page)
    short = -k.shape[2] % page
    low = pad(k, (0, 0, 0, short), value=torch.inf).unflatten(2, (-1, page)).amin(3)
    high = pad(k, (0, 0, 0, short), value=-torch.inf).unflatten(2, (-1, page)).amax(3)
    return low, high


def page_means(
    x: Float[Tensor, "batch heads tokens dim"], page: int
) -> Float[Tensor, "batch heads pages dim"]:
    """The mean of each page of tokens; of the last page, of those that it holds.

    Raises:
        ValueError: a page below 1.
    """
    at_least_one("page", page)
    tokens, short = x.shape[2], -x.shape[2] % page
    sums = pad(x, (0, 0, 0, short)).unflatten(2, (-1, page)).sum(3)
    counts = torch.full((sums.shape[2], 1), page, device=x.device, dtype=x.dtype)
    counts[-1:] = tokens - (len(counts) - 1) * page
    means: Tensor = sums / counts
    return means


def page_scores(
    q: Float[Tensor, "batch heads 1 dim"],
    low: Float[Tensor, "batch kv_heads pages dim"],
    high: Float[Tensor, "batch kv_heads pages dim"],
    *,
    shared: bool = True,
) -> Float[Tensor, "batch list_heads pages"]:
    """Each page's bound, in float32: the largest of a group's heads when `shared`, else by query head.

    Σ_d max(q low, q high) = q⁺ · high − q⁻ · low with q⁺ = max(q, 0), q⁻ = max(−q, 0): two products.
    """
    from attlas.ops.decode_kernels import score_pages, scores_refused

    if scores_refused(q, low) is None:
        return score_pages(q, low, high, shared=shared)
    return reference_page_scores(q, low, high, shared=shared)


def reference_page_scores(q: Tensor, low: Tensor, high: Tensor, *, shared: bool) -> Tensor:
    """`page_scores` by two products."""
    grouped = q[:, :, 0].unflatten(1, (low.shape[1], -1)).float()
    bound = grouped.clamp(min=0) @ high.float().mT + grouped.clamp(max=0) @ low.float().mT
    scores: Tensor = bound.amax(2) if shared else bound.flatten(1, 2)
    return scores


def best_pages(
    scores: Float[Tensor, "batch heads pages"], count: int
) -> Int[Tensor, "batch heads count"]:
    """Numbers of the `count` pages of highest score, ascending, as int32; −1 where it is −∞.

    Equal scores are decided for the earlier page on every route.
    """
    from attlas.ops.decode_kernels import choice_refused, choose_pages

    count = min(count, scores.shape[-1])
    if count <= FEW and scores.shape[:-1].numel() >= MANY:
        return _largest(scores, count)
    if choice_refused(scores) is None:
        return choose_pages(scores, count)
    return reference_best_pages(scores, count)


def _largest(scores: Tensor, count: int) -> Tensor:
    """`best_pages` of a few, one after the other: as many passes over the scores, and no sorting."""
    left, found = scores.clone(), []
    for _ in range(count):
        top, at = left.max(dim=-1, keepdim=True)
        found.append(torch.where(top > -torch.inf, at, scores.shape[-1]))
        left.scatter_(-1, at, -torch.inf)
    chosen = torch.cat(found, dim=-1).sort(dim=-1).values
    return torch.where(chosen == scores.shape[-1], -1, chosen).to(torch.int32)


def reference_best_pages(scores: Tensor, count: int) -> Tensor:
    """`best_pages` by sorting."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    chosen = order.sort(dim=-1).values
    there = scores.gather(-1, chosen) > -torch.inf
    return torch.where(there, chosen, -1).to(torch.int32)
