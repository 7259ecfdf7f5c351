"""Fused neighbourhood attention: a running softmax over the tiles of keys that a tile of queries touches.

    unfused     S = q K_Nᵀ · scale [tokens, Π window],   out = softmax(S) V_N      N: a query's neighbours
    fused       for each tile of queries, over the tiles j of keys that one of their windows touches:
                m' = max(m, max s_j)    l' = e^(m−m') l + Σ e^(s_j−m')    a' = e^(m−m') a + e^(s_j−m') v_j
                out = a / l             lse = m + log l

Along each axis a query sees the `window` keys nearest to it; at borders the window is shifted inwards
and keeps its size. Along a causal axis it sees the last `window` keys up to its own, fewer at the
beginning. Pattern and tiles: `masks.neighborhood`, `masks.tiles`.

Cost: O(n Π window) either way. The unfused form gathers every query's neighbours, n · Π window · dim
numbers; the memory of the fused form does not grow with the window.
Reduces to full attention where the window covers the grid.
Source: "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock
Level".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from attlas.catalog.kinds import OP
from attlas.catalog.registry import mechanism
from attlas.errors import UnknownName
from attlas.masks.neighborhood import Neighborhood, axes_of
from attlas.ops.attend import attend
from attlas.ops.memory_efficient import memory_efficient
from attlas.ops.neighborhood import CPU, by_tiles, natural, neighbours_gathered
from attlas.tracing import traced

Form = Literal["fused", "unfused"]
FORMS: tuple[Form, ...] = ("fused", "unfused")


@mechanism(
    "fused-neighborhood-attention", aliases=("fna",), kind=OP,
    example={"shape": (6, 6), "window": 3, "causal": (True, False)},
)  # fmt: skip
def fused_neighborhood(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens v_dim"],
    *,
    shape: int | Sequence[int],
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    return_lse: bool = False,
    form: Form = "fused",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to the nearest keys of a grid; `(out, lse)` with `return_lse`.

    Args:
        q: queries, the tokens of the grid row by row.
        k: keys of the same tokens; their heads divide the query heads.
        v: values of the same tokens.
        shape: tokens along each of 1 to 3 axes.
        window: keys that a query sees along each axis; one number is for all axes, here and below.
        dilation: tokens from one visible key to the next.
        causal: whether an axis shows earlier keys alone.
        scale: of the products; 1/√dim unless given.
        return_lse: give log Σ exp(scores) [batch, heads, tokens] too.
        form: "fused" over tiles, or "unfused" over each query's neighbours.

    Raises:
        ValueError: sizes that do not fit one another, or an unknown form.
    """
    if form not in FORMS:
        raise UnknownName("form", form, FORMS)
    axes = axes_of(shape, window, 1, dilation, causal)
    pattern = natural(q, k, axes)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if form == "unfused":
        out, lse = neighbours_gathered(q, k, v, axes, scale)
    elif traced():
        out, lse = attend(q, k, v, mask=pattern, scale=scale, q_offset=0, return_lse=True)
    else:
        out, lse = by_tiles(q, k, v, axes, partial(_fused, scale=scale))
    return (out, lse) if return_lse else out


def _fused(
    q: Tensor, k: Tensor, v: Tensor, pattern: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of tokens in tiles: FlexAttention's kernel on a GPU, chunk by chunk elsewhere."""
    if q.is_cuda:
        return attend(q, k, v, mask=pattern, scale=scale, q_offset=0, return_lse=True)
    return memory_efficient(q, k, v, mask=pattern, scale=scale, q_offset=0, q_chunk=CPU[0])
