"""Lists of single tokens, packed: queries that list the same block of keys become one block of queries.

    rows of block j = the queries that list j, as many whole blocks of ROWS as they fill
    out_t           = merge of what t got as a row of each block that it lists, and of its own block

Every block of rows then meets one block of keys, whole: only the block in which a query itself stands is
cut by `causal`, and is attended to apart. Nothing is asked of the device, so that nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from attlas.ops.packed_rows import joined, taken

#: Queries of a block.
ROWS = 128

#: (q, k, v, lists, size of a block, whether causal, offset) → (out, lse), of blocks of queries.
Attended = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[int, int], bool, int], tuple[Tensor, Tensor]]


def packed(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys v_dim"],
    blocks: Int[Tensor, "_ _ queries count"],
    size: int,
    causal: bool,
    offset: int,
    attended: Attended,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that have a list each, of blocks of `size` keys; differentiable."""
    heads = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // blocks.shape[1])
    listed = blocks.long().expand(len(q), -1, -1, -1)[:, heads]
    beside = None
    if causal:
        own = (offset + torch.arange(q.shape[2], device=q.device))[:, None] // size
        beside = _own(q, k, v, (listed == own).any(-1), size, offset, attended)
        listed = torch.where(listed < own, listed, -1)
    plan = Plan.of(listed, -(-k.shape[2] // size))
    rows = taken(q, plan.tokens, plan.rows)
    out, lse = attended(rows, k, v, plan.lists, (ROWS, size), False, 0)
    return joined(beside, out, lse, plan.rows)


def _own(
    q: Tensor, k: Tensor, v: Tensor, listed: Tensor, size: int, offset: int, attended: Attended
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the block in which it stands, where it lists it."""
    step = min(ROWS, size)
    before = offset % step  # blocks of queries begin where those of keys may
    rows = pad(q, (0, 0, before, 0))
    first = torch.arange(offset - before, offset + q.shape[2], step, device=q.device)
    lists = (first // size)[None, None, :, None]
    out, lse = attended(rows, k, v, lists, (step, size), True, offset - before)
    return out[:, :, before:], lse[:, :, before:].masked_fill(~listed, -torch.inf)


@dataclass(frozen=True)
class Plan:
    """Which query stands in which row.

    Attributes:
        tokens: the query of each row; of rows that are none, any.
        lists: the block of keys of each block of rows, −1 of none.
        rows: where each query stands for each block that it lists; the number of rows for none.
    """

    tokens: Int[Tensor, "batch heads rows"]
    lists: Int[Tensor, "batch heads blocks 1"]
    rows: Int[Tensor, "batch heads queries count"]

    @classmethod
    def of(cls, listed: Int[Tensor, "batch heads queries count"], there: int) -> Plan:
        """The plan of lists of `there` blocks, −1 standing for none."""
        count = listed.shape[3]
        number = torch.where(listed < 0, there, listed).int().flatten(2)
        number, order = number.sort(stable=True)
        every = torch.arange(there + 1, device=listed.device, dtype=torch.int32)
        begins = torch.searchsorted(number, every.expand(*number.shape[:2], -1).contiguous())
        most = -(-(number.shape[2] + there * (ROWS - 1)) // ROWS)
        filled = -(-begins.diff(dim=-1) // ROWS) * ROWS
        ends = filled.cumsum(-1)
        shift = pad(ends - filled, (0, 1)) - begins
        at = torch.arange(number.shape[2], device=listed.device) + shift.gather(-1, number.long())
        at = torch.where(number == there, most * ROWS, at)
        tokens = at.new_zeros(*at.shape[:2], most * ROWS + 1).scatter(-1, at, order // count)
        first = torch.arange(0, most * ROWS, ROWS, device=listed.device).expand(*at.shape[:2], -1)
        block = torch.searchsorted(ends, first.contiguous(), right=True)
        lists = torch.where(block == there, -1, block)[..., None]
        rows = torch.empty_like(at).scatter(-1, order, at).unflatten(2, (-1, count))
        return cls(tokens[..., :-1], lists, rows)
