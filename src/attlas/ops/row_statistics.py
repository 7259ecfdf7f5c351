"""`row_statistics`: what each row of attention weights is like, with no map of all pairs in memory.

    p_ij = exp(s_ij − lse_i)        s = score_mod(q kᵀ · scale), hidden pairs at −∞

| statistic  | of query i                                                                              |
|------------|-----------------------------------------------------------------------------------------|
| lse        | log Σ_j exp(s_ij); −∞ where nothing is seen                                              |
| entropy    | − Σ_j p_ij ln p_ij, in nats                                                              |
| peak       | max_j p_ij; `peak_at` is its key                                                         |
| first      | Σ p over the first tokens                                                                |
| itself     | p_ii                                                                                     |
| previous   | p_i,i−1                                                                                  |
| distance   | Σ_j p_ij · abs(i − j)                                                                    |
| duplicate  | Σ p over j < i with id_j = id_i                                                          |
| induction  | Σ p over j ≤ i with id_{j−1} = id_i: what came after an earlier token like this one      |
| copying    | Σ p over j ≤ i with id_j = id_{i+1}: tokens like the one that comes next                 |

Sums of p times something of the pair are one product with what all heads share. Entropy is summed as
log Σ e^(s−max) − Σ p (s − max), neither of which is negative. Sink logits take their share of each row.

| route     | takes it when                                                                    |
|-----------|----------------------------------------------------------------------------------|
| reference | always; blocks of queries, `BLOCK` scores at a time                               |
| kernel    | a CUDA device with Triton, no score_mod, causal, padding, both, or booleans       |

Cost: the products of queries and keys, and some operations a pair; memory linear in the length.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from attlas import masks
from attlas.errors import UnknownName
from attlas.masks import Mask
from attlas.ops.block_kernels import inside
from attlas.ops.block_sparse import hides_future
from attlas.ops.decode_kernels import has_kernels
from attlas.ops.exact import exact, wide
from attlas.ops.reference import grouped_product, indices
from attlas.ops.row_features import MASSES, PLAIN, ids_at, pair_features, products
from attlas.positions.base import ScoreMod

StatisticsRoute = Literal["auto", "reference", "kernel"]
ROUTES: tuple[StatisticsRoute, ...] = ("auto", "reference", "kernel")
#: Scores held at once by the reference: 4 MiB in float32 on a CPU, whose caches hold them, else 128 MiB.
BLOCK, BLOCK_CUDA = 2**20, 2**25
#: The score of a hidden pair: its weight is 0, and 0 times it is too.
LOW = -1e30
#: Widths of heads that the kernel takes, and what it multiplies.
NARROW, WIDE = 16, 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class RowStatistics(NamedTuple):
    """What `row_statistics` gives, [batch, heads, queries] unless said otherwise; None if not asked for.

    `received` [batch, heads, keys] is Σ_i p_ij, and `seen_by` [batch, 1 or heads, keys] how many queries
    see the key: their quotient is the mean attention that a key receives.
    """

    lse: Tensor
    entropy: Tensor
    peak: Tensor
    first: Tensor
    itself: Tensor
    previous: Tensor
    distance: Tensor
    duplicate: Tensor | None = None
    induction: Tensor | None = None
    copying: Tensor | None = None
    peak_at: Tensor | None = None
    received: Tensor | None = None
    seen_by: Tensor | None = None


@exact
@torch.no_grad()
def row_statistics(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys k_dim"],
    *,
    ids: Int[Tensor, "rows tokens"] | None = None,
    first: int | Int[Tensor, " batch"] = 1,
    mask: Mask | Bool[Tensor, "b h #queries #keys"] | None = None,
    score_mod: ScoreMod | None = None,
    sinks: Float[Tensor, " logits"] | None = None,
    valid: Bool[Tensor, "rows asked"] | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    peak_at: bool = False,
    received: bool = False,
    route: StatisticsRoute = "auto",
) -> RowStatistics:
    """Statistics of the weights of q over k, in float32, of float64 in float64; without gradients.

    Args:
        q: queries.
        k: keys; their heads divide the query heads.
        ids: of the tokens at positions 0, 1, …, −1 where there is none; a token behind the last query
            is what that query's `copying` is about, else 0. Without ids three statistics are None.
        first: keys before this position are the first tokens; of each row its own, where rows are padded.
        mask: a pattern, or booleans that broadcast to [batch, heads, queries, keys], True visible.
        score_mod: pointwise change of the scaled scores.
        sinks: a logit of each head that takes part in the softmax without a key; not in `lse`.
        valid: which queries are no padding; the statistics of others are 0.
        scale: of the products; 1/√dim unless given.
        q_offset: position of the first query; `keys - queries` unless given.
        peak_at: give the key of the largest weight too, −1 where nothing is seen.
        received: give `received` and `seen_by` too.
        route: "auto", or one route by name.

    Raises:
        ValueError: shapes that do not go together, or a route that cannot take the call.
        TypeError: a mask that is neither a pattern nor of booleans.
    """
    _check(q, k, ids, mask, sinks, valid)
    if route not in ROUTES:
        raise UnknownName("route", route, ROUTES)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    until = torch.as_tensor(first, device=q.device).expand(q.shape[0])
    reason = refuses(q, k, mask, score_mod) if route != "reference" else ""
    if route == "kernel" and reason is not None:
        raise ValueError(f"route='kernel' cannot take this call: {reason}")
    if reason is None:
        found = kernel(q, k, ids, until, mask, sinks, valid, scale, offset, peak_at, received)
    else:
        found = _reference(
            q, k, ids, until, mask, score_mod, sinks, valid, scale, offset, peak_at, received
        )
    return found._replace(seen_by=_seen_by(q, k, mask, valid, offset)) if received else found


def _reference(
    q: Tensor, k: Tensor, ids: Tensor | None, until: Tensor, mask: Mask | Tensor | None,
    score_mod: ScoreMod | None, sinks: Tensor | None, valid: Tensor | None, scale: float, offset: int,
    peak_at: bool, received: bool,
) -> RowStatistics:  # fmt: skip
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    columns = wide(k).mT
    count = (BLOCK_CUDA if q.is_cuda else BLOCK) // max(1, batch * heads * keys)
    rows: list[Tensor] = []
    peaks: list[Tensor] = []
    sums = columns.new_zeros(batch, heads, keys)
    if keys == 0 or 0 in q.shape:
        empty = columns.new_zeros(2 + (PLAIN if ids is None else len(MASSES)), batch, heads, queries)
        lse = columns.new_full((1, batch, heads, queries), -torch.inf)
        none = torch.full((batch, heads, queries), -1, device=q.device)
        return _told(torch.cat([lse, empty]), none if peak_at else None, sums if received else None)
    future = isinstance(mask, Mask) and hides_future(mask)
    for start in range(0, queries, max(1, count)):
        block = slice(start, min(start + max(1, count), queries))
        at = torch.arange(offset + block.start, offset + block.stop, device=q.device)
        end = min(keys, max(1, offset + block.stop)) if future else keys
        scores = grouped_product(wide(q[:, :, block]) * scale, columns[..., :end])
        if score_mod is not None:
            scores = score_mod(scores, *indices(scores, offset + start)).clamp(min=LOW)
        scores = _hidden(scores, mask, block, at)
        top = scores.amax(-1, keepdim=True)
        weights = scores.softmax(-1)
        peak = weights.amax(-1)  # e^0 / Σ e^(s − top)
        if peak_at:
            peaks.append(scores.argmax(-1).masked_fill(top[..., 0] <= LOW / 2, -1))
        spread = -peak.log() - scores.sub_(top).mul_(weights).sum(-1)
        features = pair_features(at, torch.arange(end, device=q.device), until, ids, weights.dtype)
        masses = products(weights, features).movedim(-1, 0)
        each = torch.cat([torch.stack([top[..., 0] - peak.log(), spread, peak]), masses])
        share = _share(each[0], sinks, None if valid is None else valid[:, block])
        rows.append(_shared(each, share, sinks))
        if received:
            sums[..., :end] += torch.einsum("bhr,bhrk->bhk", share, weights)
    found = torch.cat(rows, dim=-1)
    return _told(found, torch.cat(peaks, dim=-1) if peak_at else None, sums if received else None)


def _hidden(scores: Tensor, mask: Mask | Tensor | None, block: slice, at: Tensor) -> Tensor:
    """Scores of a block of queries at positions `at`, hidden pairs at `LOW`."""
    if isinstance(mask, Mask) and mask == masks.causal:  # only the last columns are cut
        end = scores.shape[-1]
        first = min(end, max(0, int(at[0]) + 1))
        hidden = torch.arange(first, end, device=scores.device) > at[:, None]
        scores[..., first:].masked_fill_(hidden, LOW)
        return scores
    seen = _visible(mask, block, at, scores.shape[-1])
    return scores if seen is None else scores.masked_fill_(~seen, LOW)


def _visible(
    mask: Mask | Tensor | None, block: slice, at: Tensor, keys: int
) -> Bool[Tensor, "b h #queries #keys"] | None:
    """Which of the first keys a block of queries at positions `at` sees; None for all."""
    if mask is None:
        return None
    if isinstance(mask, Mask):
        return masks.at(mask, at, torch.arange(keys, device=at.device))
    seen = mask if mask.shape[2] == 1 else mask[:, :, block]
    return seen if seen.shape[3] == 1 else seen[..., :keys]


def _share(
    lse: Float[Tensor, "batch heads rows"], sinks: Tensor | None, valid: Tensor | None
) -> Float[Tensor, "batch heads rows"]:
    """How much of each row's weight lies on keys: what is left of sink logits, 0 of what sees nothing."""
    share = (lse > LOW / 2).to(lse.dtype)
    if sinks is not None:
        share = share * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
    return share if valid is None else share * valid[:, None]


def _shared(each: Tensor, share: Tensor, sinks: Tensor | None) -> Tensor:
    """[statistics, batch, heads, rows] of weights that sum to one, when they sum to `share`."""
    lse = each[:1]
    if sinks is not None:
        each[1] += softplus(sinks.to(lse.dtype)[:, None] - lse[0])
    return torch.cat([lse.masked_fill(lse <= LOW / 2, -torch.inf), each[1:] * share])


def _told(found: Tensor, peak_at: Tensor | None, received: Tensor | None) -> RowStatistics:
    return RowStatistics(*found.unbind(0))._replace(peak_at=peak_at, received=received)


def _seen_by(
    q: Tensor, k: Tensor, mask: Mask | Tensor | None, valid: Tensor | None, offset: int
) -> Int[Tensor, "batch h keys"]:
    """How many valid queries see each key."""
    (batch, _, queries, _), keys = q.shape, k.shape[2]
    asked = q.new_ones(batch, queries, dtype=torch.float32) if valid is None else valid.float()
    heads = (mask.heads or 1) if isinstance(mask, Mask) else 1 if mask is None else mask.shape[1]
    total = asked.new_zeros(batch, heads, keys)
    rows = max(1, (BLOCK_CUDA if q.is_cuda else BLOCK) // max(1, batch * heads * keys))
    for start in range(0, queries, rows):
        block = slice(start, min(start + rows, queries))
        at = torch.arange(offset + block.start, offset + block.stop, device=q.device)
        seen = _visible(mask, block, at, keys)
        pairs = asked.new_ones(()) if seen is None else seen.float()
        pairs = pairs.expand(batch, heads, len(at), keys)
        total += torch.einsum("br,bhrk->bhk", asked[:, block], pairs)
    return total.long()


def refuses(
    q: Tensor, k: Tensor, mask: Mask | Tensor | None, score_mod: ScoreMod | None
) -> str | None:
    """Why the kernel cannot take a call, None when it can."""
    if not q.is_cuda:
        return f"q is on {q.device}, not on a CUDA device"
    if score_mod is not None:
        return "scores are changed by a score_mod"
    if q.dtype != k.dtype or q.dtype not in DTYPES:
        return f"q and k are {q.dtype} and {k.dtype}, not both of one of {DTYPES}"
    if not NARROW <= q.shape[-1] <= WIDE:
        return f"heads are {q.shape[-1]} wide, not from {NARROW} to {WIDE}"
    if isinstance(mask, Mask) and inside(mask) is None:
        return f"{mask!r} is not causal, padding, or both"
    if not q.numel() or not k.numel():
        return "there is nothing to compute"
    return None if has_kernels(q.device) else "there is no Triton for the device"


def kernel(
    q: Tensor, k: Tensor, ids: Tensor | None, until: Tensor, mask: Mask | Tensor | None,
    sinks: Tensor | None, valid: Tensor | None, scale: float, offset: int, peak_at: bool, received: bool,
) -> RowStatistics:  # fmt: skip
    """By kernels, of a call that `refuses` gives no reason against."""
    from attlas.kernels import row_statistics_run as kernels

    causal, pairs = False, mask if isinstance(mask, Tensor) else None
    if isinstance(mask, Mask):
        held = inside(mask)
        assert held is not None
        causal, known = held
        pairs = None if known is None else known[:, None, None, : k.shape[2]]
    taken = None
    if ids is not None:
        here = torch.arange(offset, offset + q.shape[2], device=q.device)
        there = torch.arange(k.shape[2], device=q.device)
        own, coming = (ids_at(ids, here + step)[:, 0] for step in (0, 1))
        own, coming = (x.masked_fill(x < 0, -2) for x in (own, coming))
        tokens, before = (ids_at(ids, there + step)[:, 0] for step in (0, -1))
        taken = tuple(x.int().contiguous() for x in (own, coming, tokens, before))
    call = kernels.Call(q, k, pairs, causal, scale, offset)
    each, tops, at = call.rows(until, taken, LOW, peak_at)
    share = _share(each[0], sinks, valid)
    sums = call.columns(tops, share * each[2], LOW) if received else None
    return _told(_shared(each, share, sinks), at, sums)


def _check(
    q: Tensor, k: Tensor, ids: Tensor | None, mask: Mask | Tensor | None, sinks: Tensor | None,
    valid: Tensor | None,
) -> None:  # fmt: skip
    """Refuse what does not go together, by the argument's name."""
    if not q.ndim == k.ndim == 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k take [batch, heads, tokens, dim] of one batch and width, got {list(q.shape)} and "
            f"{list(k.shape)}"
        )
    batch, heads, queries, _ = q.shape
    if heads % k.shape[1]:
        raise ValueError(f"heads of k must divide those of q ({heads}), got {k.shape[1]}")
    wanted = batch, heads, queries, k.shape[2]
    if isinstance(mask, Mask):
        if mask.heads not in (None, 1, heads):
            raise ValueError(f"mask is for {mask.heads} heads, q has {heads}")
    elif mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask takes a pattern or booleans, True visible, got {mask.dtype}")
        if mask.ndim != 4 or any(m not in (1, w) for m, w in zip(mask.shape, wanted, strict=True)):
            raise ValueError(f"mask must broadcast to {list(wanted)}, got {list(mask.shape)}")
    for name, x, size in (("sinks", sinks, [heads]), ("valid", valid, [batch, queries])):
        if x is not None and list(x.shape) != size:
            raise ValueError(f"{name} takes {size}, got {list(x.shape)}")
    if ids is not None and (ids.ndim != 2 or len(ids) != batch):
        raise ValueError(f"ids takes [{batch}, tokens], got {list(ids.shape)}")
