"""Trained biases of distances: a number for each head and distance, and its gradient along diagonals.

    S_hij = q_hi k_hjᵀ · scale + B[h, j − i]      dB[h, δ] = Σ_b Σ_{j−i=δ} dS_bhij
    dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O) + dlse)

Whatever makes the numbers (T5's buckets, a prior's scale and shape) is asked once for each distance, a
table of as many numbers as there are tokens, and autograd goes on from the table to what is trained.
Asked pair by pair, each pair's gradient would be added to the same few numbers: on a GPU one after the
other.

Cost: a sum over the n² pairs of dS. In chunks it is a copy and a sum of what is there; beside
FlexAttention a kernel makes dS once more, 2 of the 7 products that a backward and a forward pass have.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attlas.masks import Mask
from attlas.ops import toeplitz_kernels as kernels
from attlas.ops.flex import flex
from attlas.ops.reference import reference
from attlas.positions.base import ScoreMod, by_distance, captured, from_table
from attlas.tracing import traced


def table_of(
    score_mod: ScoreMod | None, q: Tensor, keys: int, offset: int
) -> Float[Tensor, "heads distances"] | None:
    """What a score_mod adds at each distance of a call, the distance 0 in the middle of a row.

    Args:
        score_mod: the change of scores.
        q: queries, [batch, heads, queries, dim].
        keys: how many there are.
        offset: position of the first query.

    Returns:
        The numbers, in float32 at least; None where it hangs on more than head and distance, or rests on
        no tensor that may be trained, and so is quickly made anew for each pair.
    """
    bias = by_distance(score_mod)
    if bias is None or not captured(score_mod):
        return None
    _, heads, queries, _ = q.shape
    reach = max(offset + queries, keys - offset)
    distance = torch.arange(1 - reach, reach, device=q.device)
    found = bias(torch.arange(heads, device=q.device)[:, None], distance)
    return found.to(torch.promote_types(q.dtype, torch.float32)).expand(heads, -1)


# Pairs in memory ---------------------------------------------------------------------------------------


def strip(table: Tensor, rows: slice, run: slice) -> Float[Tensor, "heads rows keys"]:
    """The numbers of the pairs of queries at positions `rows` and keys `run`."""
    queries, keys, first = _place(table, rows, run)
    # Row i begins one distance before row i − 1; what unfolds begins one later.
    return table[:, first : first + queries + keys - 1].unfold(-1, keys, 1).flip(-2)


def add_diagonals(
    onto: Float[Tensor, "heads distances"], pairs: Float[Tensor, "batch heads rows keys"],
    rows: slice, run: slice,
) -> None:  # fmt: skip
    """Add each diagonal's sum to the number of its distance."""
    queries, keys, first = _place(onto, rows, run)
    width = queries + keys - 1
    each = pairs.sum(0)
    # Written with rows one shorter than they are read, every row stands one further to the left.
    skewed = each.new_zeros(len(each), queries * width)
    skewed.as_strided(each.shape, (queries * width, width - 1, 1), queries - 1).copy_(each)
    onto[:, first : first + width] += skewed.view(len(each), queries, width).sum(1)


def _place(table: Tensor, rows: slice, run: slice) -> tuple[int, int, int]:
    """Numbers of queries and keys, and where in the table the least of their distances stands."""
    queries, keys = rows.stop - rows.start, run.stop - run.start
    return queries, keys, run.start - rows.stop + 1 + table.shape[1] // 2


def spread(table: Tensor, queries: int, keys: int, offset: int) -> Float[Tensor, "heads queries keys"]:
    """The numbers of all pairs, differentiable as often as one likes."""
    result: Tensor = _Spread.apply(table, queries, keys, offset)  # type: ignore[no-untyped-call]
    return result


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, queries: int, keys: int, offset: int) -> Tensor:
        ctx.place = slice(offset, offset + queries), slice(0, keys)
        ctx.width = table.shape[1]
        return strip(table, *ctx.place)

    @staticmethod
    def backward(ctx: Any, d_pairs: Tensor) -> tuple[Tensor | None, ...]:
        return _Gathered.apply(d_pairs, ctx.width, *ctx.place), None, None, None  # type: ignore[no-untyped-call]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor, width: int, rows: slice, run: slice) -> Tensor:
        ctx.place = rows, run
        table = pairs.new_zeros(len(pairs), width)
        add_diagonals(table, pairs[None], rows, run)
        return table

    @staticmethod
    def backward(ctx: Any, d_table: Tensor) -> tuple[Tensor | None, ...]:
        rows, run = ctx.place
        pairs = spread(d_table, rows.stop - rows.start, run.stop, rows.start)
        return pairs, None, None, None


# Beside FlexAttention ----------------------------------------------------------------------------------


def flex_biased(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, mask: Mask | None, scale: float, q_offset: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) by FlexAttention, whose gradients of q, k and v do not know that the table is trained;
    its own gradient comes by a kernel, where that can take the call."""
    trains = torch.is_grad_enabled() and table.requires_grad
    work = None
    if trains and not traced() and kernels.refuses(q, k, v) is None:
        work = kernels.work_of(q, k, v, mask, q_offset)
    shown = table if work is None else table.detach()
    out, lse = flex(q, k, v, mask=mask, table=shown, scale=scale, q_offset=q_offset)
    if work is None:
        return out, lse
    call = (mask, work, scale, q_offset)
    result: tuple[Tensor, Tensor] = _ByDiagonals.apply(out, lse, table, q, k, v, call)  # type: ignore[no-untyped-call]
    return result


class _ByDiagonals(torch.autograd.Function):
    """(out, lse) as they are, and a gradient for the table that they were made with."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, lse: Tensor, table: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(out, lse, table, q, k, v)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, table, q, k, v = ctx.saved_tensors
        mask, work, scale, offset = ctx.call
        if torch.is_grad_enabled():  # it will itself be differentiated: with all pairs in memory
            found = reference(
                q, k, v, scale=scale, mask=mask, score_mod=from_table(table), q_offset=offset
            )
            given = [(y, d) for y, d in zip(found, (d_out, d_lse), strict=True) if d is not None]
            ys, ds = zip(*given, strict=True)
            (d_table,) = torch.autograd.grad(ys, [table], ds, create_graph=True)
        else:
            d_table = kernels.gradient(q, k, v, table, out, lse, d_out, d_lse, work, scale, offset)
        return d_out, d_lse, d_table, None, None, None, None
