"""Neighbourhood attention on grids of 1, 2 or 3 axes, by tiles of tokens that the block routes see dense.

    out = softmax(q kᵀ · scale + bias, hidden pairs at −∞) v      pairs: `masks.neighborhood`

| route  | does                                                                                 |
|--------|--------------------------------------------------------------------------------------|
| dense  | the definition, all pairs in memory                                                  |
| gather | puts each query's own neighbours side by side, n · Π window · dim numbers            |
| tiles  | puts the tokens of boxes of the grid side by side, attends by blocks, puts them back |

Tiles are those that touch the fewest blocks, `masks.tiles`. Cost: O(n Π window) beside the tokens that
the tiles round up; O(n) where tokens change places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas.errors import UnknownName
from attlas.masks import hides_nothing
from attlas.masks.neighborhood import Axis, Neighborhood, Order, axes_of
from attlas.masks.tiles import best_tiles
from attlas.ops.attend import SMALL, attend
from attlas.ops.reference import reference, repeated, softmax
from attlas.positions.base import ScoreMod, additive
from attlas.tracing import kept, traced

Route = Literal["auto", "dense", "gather", "tiles"]
ROUTES: tuple[Route, ...] = ("auto", "dense", "gather", "tiles")

#: Queries and keys to a tile: the blocks of `attend`'s routes.
CPU, CUDA = (128, 64), (128, 128)
#: Numbers up to which each query's own copies of its keys are held at once, for a bias's sake.
GATHERED = 1 << 27

#: An engine: (q, k, v, pattern) whose tokens stand in tiles -> out, or (out, lse).
Engine = Callable[[Tensor, Tensor, Tensor, Neighborhood], Tensor | tuple[Tensor, Tensor]]


def neighborhood(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens v_dim"],
    *,
    shape: int | Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    bias: Float[Tensor, "*offsets"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    route: Route = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Each token's attention to its neighbourhood; `(out, lse)` with `return_lse`.

    Args:
        q: queries, the tokens of the grid row by row.
        k: keys of the same tokens; their heads divide the query heads.
        v: values of the same tokens.
        shape: tokens along each of 1 to 3 axes.
        window: keys that a query sees along each axis; one number is for all axes, here and below.
        stride: queries that share a window, at most `window`.
        dilation: tokens from one visible key to the next.
        causal: whether an axis shows earlier keys alone.
        bias: added to the scores by head and offset, 2 · window − 1 of them along each axis, those of
            a key as far behind its query as can be first; offsets are counted in dilated steps.
        scale: of the products; 1/√dim unless given.
        dropout: share of weights dropped.
        return_lse: give log Σ exp(scores) [batch, heads, tokens] too.
        route: "auto", or one route by name.

    Raises:
        ValueError: sizes that do not fit one another, see `masks.neighborhood`; dropout with an lse or
            by another route than 'dense'; an unknown route.
    """
    axes = axes_of(shape, window, stride, dilation, causal)
    pattern = natural(q, k, axes)
    mod = None if bias is None else relative_bias(bias, pattern, q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if route not in ROUTES:
        raise UnknownName("route", route, ROUTES)
    if dropout > 0 and (return_lse or route in ("gather", "tiles")):
        raise ValueError(f"dropout={dropout} takes neither return_lse nor route='gather' or 'tiles'")
    if route == "dense":
        found = reference(q, k, v, scale=scale, mask=pattern, score_mod=mod, dropout=dropout)
        return found if return_lse else found[0]
    run: Any = attend  # which tells what it gives by the literal value of return_lse
    rest = {"scale": scale, "return_lse": return_lse, "q_offset": 0}
    whole = hides_nothing(pattern, q.shape[2], q.shape[2], 0)
    plain = q.shape[2] ** 2 <= SMALL or traced() or dropout > 0 or whole
    if route == "auto" and plain:
        out: Tensor | tuple[Tensor, Tensor] = run(
            q, k, v, mask=pattern, score_mod=mod, dropout=dropout, **rest
        )
        return out
    # What changes scores is summed pair by pair in tiles, into as many numbers as there are offsets.
    gathered = q.numel() * math.prod(axis.window for axis in axes)
    if route == "gather" or (route == "auto" and bias is not None and gathered <= GATHERED):
        found = neighbours_gathered(q, k, v, axes, scale, bias)
        return found if return_lse else found[0]

    def engine(
        q: Tensor, k: Tensor, v: Tensor, mask: Neighborhood
    ) -> Tensor | tuple[Tensor, Tensor]:
        change = None if bias is None else relative_bias(bias, mask, q.shape[1])
        out: Tensor | tuple[Tensor, Tensor] = run(q, k, v, mask=mask, score_mod=change, **rest)
        return out

    return by_tiles(q, k, v, axes, engine)


def neighbours_gathered(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) by products of each query with its own neighbours, which are put side by side."""
    at, there, offset = _neighbours(axes, q.device)
    k, v = (repeated(x, q.shape[1])[:, :, at] for x in (k, v))
    scores = (k @ (q * scale)[..., None])[..., 0]
    if bias is not None:
        scores = scores + bias.flatten(1)[:, offset].to(scores.dtype)
    scores = scores.masked_fill(~there, -torch.inf)
    out = (softmax(scores)[..., None, :] @ v)[..., 0, :]
    return out, torch.logsumexp(scores, -1)


@kept(64)
def _neighbours(
    axes: tuple[Axis, ...], device: torch.device
) -> tuple[Int[Tensor, "tokens seen"], Bool[Tensor, "tokens seen"], Int[Tensor, "tokens seen"]]:
    """The tokens in each query's window, row by row, whether they are there and visible, and which of
    all offsets, row by row, lies between."""
    at = torch.zeros(1, 1, dtype=torch.long, device=device)
    there, offset = torch.ones_like(at, dtype=torch.bool), at
    for axis in axes:
        x = torch.arange(axis.length, device=device)
        group, y = x % axis.dilation, x // axis.dilation
        first, last = axis.seen(y, axis.members(group))
        key = first[:, None] + torch.arange(axis.window, device=device)
        own = (key >= 0) & (key <= last[:, None])
        token = (group[:, None] + key * axis.dilation).clamp(min=0)
        most = axis.window - 1
        step = (key - y[:, None]).clamp(-most, most) + most
        at = _crossed(at * axis.length, token, torch.add)
        there = _crossed(there, own, torch.logical_and)
        offset = _crossed(offset * (2 * most + 1), step, torch.add)
    return at, there, offset


def _crossed(rows: Tensor, own: Tensor, joined: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What rows [m, s] and [n, t] give for all pairs of each: [m · n, s · t]."""
    return joined(rows[:, None, :, None], own[:, None]).flatten(2).flatten(0, 1)


def natural(q: Tensor, k: Tensor, axes: tuple[Axis, ...]) -> Neighborhood:
    """The pattern of row-major tokens.

    Raises:
        ValueError: other tokens than the grid has.
    """
    order = Order(tuple(a.length for a in axes), tuple(a.dilation for a in axes))
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or x.shape[2] != order.tokens:
            raise ValueError(
                f"{name} must be [batch, heads, tokens, dim] of shape={order.shape}, "
                f"{order.tokens} tokens, got {list(x.shape)}"
            )
    return Neighborhood(axes, order, order)


def by_tiles(
    q: Tensor, k: Tensor, v: Tensor, axes: tuple[Axis, ...], engine: Engine
) -> Tensor | tuple[Tensor, Tensor]:
    """What an engine makes of the tokens in tiles, put back row by row."""
    shape, dilation = tuple(a.length for a in axes), tuple(a.dilation for a in axes)
    q_tile, k_tile = best_tiles(axes, *(CUDA if q.is_cuda else CPU))
    queries, keys = Order(shape, dilation, q_tile), Order(shape, dilation, k_tile)
    q_at, k_at, back = _places(queries, keys, q.device)
    found = engine(
        q.index_select(2, q_at), k.index_select(2, k_at), v.index_select(2, k_at),
        Neighborhood(axes, queries, keys),
    )  # fmt: skip
    if isinstance(found, Tensor):
        return found.index_select(2, back)
    return found[0].index_select(2, back), found[1].index_select(2, back)


@kept(64)
def _places(
    queries: Order, keys: Order, device: torch.device
) -> tuple[Int[Tensor, " q_places"], Int[Tensor, " k_places"], Int[Tensor, " tokens"]]:
    """Tokens of the queries' and keys' places, the first one where they fill up; each query's place."""
    token, k_token = queries.row_major(), keys.row_major()  # on the CPU: other devices may be meta
    taken = (token >= 0).nonzero()[:, 0]
    back = torch.empty_like(taken)
    back[token[taken]] = taken
    return token.clamp(min=0).to(device), k_token.clamp(min=0).to(device), back.to(device)


def relative_bias(bias: Tensor, pattern: Neighborhood, heads: int) -> ScoreMod:
    """The change of scores that adds a bias by head and offset.

    Raises:
        ValueError: a bias that is not [heads, 2 · window − 1, …].
    """
    wanted = (heads, *(2 * axis.window - 1 for axis in pattern.axes))
    if tuple(bias.shape) != wanted:
        raise ValueError(f"bias must be {list(wanted)}, got {list(bias.shape)}")

    def biased(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        offsets = []
        sides = pattern.queries.places(q_idx), pattern.keys.places(kv_idx)
        for axis, (_, y), (_, number) in zip(pattern.axes, *sides, strict=True):
            most = axis.window - 1
            offsets.append((number - y).clamp(-most, most) + most)  # pairs further apart are hidden
        return score + bias[(h, *offsets)].to(score.dtype)

    biased.of_call = True  # type: ignore[attr-defined]
    return additive(biased)
