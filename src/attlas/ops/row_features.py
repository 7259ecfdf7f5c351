"""What statistics of attention rows are sums of: a number of each pair, times its weight.

    mass_f(i) = Σ_j p_ij f_ij        f: one of `MASSES`, see `attlas.ops.row_statistics`

Cost: as many numbers a pair as there are masses, alike for all heads that see the same keys.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

#: In the order of their columns; the last three ask for ids.
MASSES = ("first", "itself", "previous", "distance", "duplicate", "induction", "copying")
PLAIN = 4


def pair_features(
    queries: Int[Tensor, " queries"], keys: Int[Tensor, " keys"] | Int[Tensor, "batch heads keys"],
    until: Int[Tensor, " batch"], ids: Int[Tensor, "batch tokens"] | None, dtype: torch.dtype,
) -> Float[Tensor, "batch h queries some keys"]:  # fmt: skip
    """What each of `MASSES` multiplies the weights of a block by.

    Args:
        queries: positions of the queries.
        keys: positions of the keys, per head where these differ (-1: none).
        until: keys before it are a row's first tokens.
        ids: of the tokens at positions 0, 1, …; −1 where there is none.
        dtype: of the weights.
    """
    columns = keys.long() if keys.ndim == 3 else keys.long().expand(1, 1, -1)
    q, k = queries[:, None], columns[:, :, None]
    size = (len(until), columns.shape[1], len(queries), PLAIN if ids is None else len(MASSES))
    found = torch.empty(*size, columns.shape[2], dtype=dtype, device=queries.device)
    found[..., 0, :] = k < until[:, None, None, None]
    found[..., 1, :] = k == q
    found[..., 2, :] = k == q - 1
    found[..., 3, :] = (k - q).abs()
    if ids is not None:
        own, coming = (ids_at(ids, queries + step).transpose(1, 2)[:, None] for step in (0, 1))
        there, before = (ids_at(ids, columns + step)[:, :, None] for step in (0, -1))
        own, coming = (x.masked_fill(x < 0, -2) for x in (own, coming))  # nothing is like no token
        behind = k <= q
        found[..., 4, :] = (there == own) & (k < q)
        found[..., 5, :] = (before == own) & behind
        found[..., 6, :] = (there == coming) & behind
    return found


def ids_at(ids: Tensor, columns: Tensor) -> Int[Tensor, "batch h columns"]:
    """Ids at positions [columns] or [batch or 1, heads or 1, columns], −1 outside."""
    columns = columns if columns.ndim == 3 else columns[None, None]
    around = pad(ids, (1, 1), value=-1)[:, None].expand(-1, columns.shape[1], -1)
    at = columns.clamp(-1, ids.shape[1]).long() + 1
    return around.gather(-1, at.expand(ids.shape[0], -1, -1))


def products(weights: Tensor, features: Tensor) -> Float[Tensor, "batch heads queries some"]:
    """Σ over the keys of weights times each feature."""
    if features.shape[1] == 1:  # all heads share them
        return torch.einsum("bhrk,brfk->bhrf", weights, features[:, 0])
    return torch.einsum("bhrk,bhrfk->bhrf", weights, features)


def of_weights(
    weights: Float[Tensor, "batch heads queries keys"],
    features: Float[Tensor, "batch h queries some keys"],
) -> dict[str, Float[Tensor, "batch heads queries"]]:
    """The statistics of weights that are there, but for lse; `features` are those of `pair_features`."""
    return {
        "entropy": torch.special.entr(weights).sum(-1),
        "peak": weights.amax(-1) if weights.shape[-1] else weights.new_zeros(weights.shape[:3]),
        **dict(zip(MASSES, products(weights, features).unbind(-1), strict=False)),
    }
