"""Generalized neighbourhood attention: windows that move by strides, from sliding to blocked.

    out = softmax(q kᵀ · scale) v over the keys of the window of each query's leader

Along an axis of n tokens with window w and stride s the queries y of a stride group share the window
of its middle one, or of its last one where the axis is causal:

    leader = min(s ⌊y/s⌋ + ⌊s/2⌋, n − 1),   keys from clamp(leader − ⌊w/2⌋, 0, n − w), w of them
    causal: leader = min(s ⌊y/s⌋ + s − 1, n − 1),   leader − w < key ≤ y

and likewise within each of the d groups of tokens d apart, d being the dilation. Tokens of a tile lie
side by side, see `ops.neighborhood`; which tiles are visited, and the speedup that this allows,
`attlas roofline --neighborhood` tells.

Cost: O(n Π w). Reduces to neighbourhood attention at s = 1, to blocked attention where s = w divides n,
to full attention where w = n.
Source: "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light".
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from attlas.catalog.kinds import OP
from attlas.catalog.registry import mechanism
from attlas.ops.neighborhood import Route, neighborhood


@mechanism(
    "generalized-neighborhood-attention", aliases=("gna",), kind=OP,
    example={"shape": (6, 6), "window": (3, 4), "stride": (1, 2)},
)  # fmt: skip
def generalized_neighborhood(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens v_dim"],
    *,
    shape: int | Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    return_lse: bool = False,
    route: Route = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to the window of each query's stride group; `(out, lse)` with `return_lse`.

    Args:
        q: queries, the tokens of the grid row by row.
        k: keys of the same tokens; their heads divide the query heads.
        v: values of the same tokens.
        shape: tokens along each of 1 to 3 axes.
        window: keys that a query sees along each axis; one number is for all axes, here and below.
        stride: queries that share a window, at most `window`.
        dilation: tokens from one visible key to the next.
        causal: whether an axis shows earlier keys alone.
        scale: of the products; 1/√dim unless given.
        return_lse: give log Σ exp(scores) [batch, heads, tokens] too.
        route: "auto", or one route of `ops.neighborhood` by name.

    Raises:
        ValueError: sizes that do not fit one another, or an unknown route.
    """
    return neighborhood(
        q, k, v, shape=shape, window=window, stride=stride, dilation=dilation, causal=causal,
        scale=scale, return_lse=return_lse, route=route,
    )  # fmt: skip
