"""Rows of packed queries: taken from the queries, and joined into one output of each.

    rows_r = q_token(r)          out_t, lse_t = merge of t's own part and of its rows

On a CUDA device by kernels that look up where a row lies, elsewhere by gathering; a gradient that shall
itself be differentiated is that of the gathered form.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.ops.decode_kernels import has_kernels
from attlas.ops.reference import merge
from attlas.tracing import traced

#: Types that the kernels take.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def taken(
    x: Float[Tensor, "batch heads queries dim"],
    tokens: Int[Tensor, "batch heads rows"],
    rows: Int[Tensor, "batch heads queries count"],
) -> Float[Tensor, "batch heads rows dim"]:
    """The queries of `tokens`, of which those at `rows` alone have gradients."""
    if by_kernels(x):
        found: Tensor = Taken.apply(x, tokens, rows)  # type: ignore[no-untyped-call]
        return found
    return x.gather(2, tokens[..., None].expand(-1, -1, -1, x.shape[3]))


def joined(
    own: tuple[Tensor, Tensor] | None,
    out: Float[Tensor, "batch heads rows dim"],
    lse: Float[Tensor, "batch heads rows"],
    rows: Int[Tensor, "batch heads queries count"],
) -> tuple[Float[Tensor, "batch heads queries dim"], Float[Tensor, "batch heads queries"]]:
    """(out, lse) of queries, of their own part, where they have one, and of their `rows`.

    A row number of as many as there are stands for none.
    """
    if by_kernels(out):
        found: tuple[Tensor, Tensor] = Joined.apply(*(own or (None, None)), out, lse, rows)  # type: ignore[no-untyped-call]
        return found
    return gathered(own, out, lse, rows)


def gathered(
    own: tuple[Tensor, Tensor] | None, out: Tensor, lse: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """`joined` by its definition."""
    parts = [] if own is None else [own]
    for at in rows.unbind(-1):
        missing, each = at == out.shape[2], at.clamp(max=out.shape[2] - 1)
        got = out.gather(2, each[..., None].expand(-1, -1, -1, out.shape[3]))
        parts.append((got, lse.gather(2, each).masked_fill(missing, -torch.inf)))
    return merge(parts)


def by_kernels(x: Tensor) -> bool:
    """Whether the kernels take rows of a tensor."""
    return x.is_cuda and x.dtype in DTYPES and not traced() and has_kernels(x.device)


class Taken(torch.autograd.Function):
    """`taken` by kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        """The rows."""
        from attlas.kernels.packed_rows import take

        rows = rows.contiguous()
        ctx.save_for_backward(rows)
        with torch.cuda.device_of(x):
            found: Tensor = take(_rows(x), tokens.contiguous())
        return found

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        """The sum of what a query's rows have."""
        from attlas.kernels.packed_rows import summed

        (rows,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            with torch.cuda.device_of(above):
                return summed(_rows(above), rows), None, None
        total = above.new_zeros(*rows.shape[:3], above.shape[3])
        for at in rows.unbind(-1):
            each = at.clamp(max=above.shape[2] - 1)[..., None].expand(-1, -1, -1, above.shape[3])
            total = total + above.gather(2, each).masked_fill((at == above.shape[2])[..., None], 0.0)
        return total, None, None


class Joined(torch.autograd.Function):
    """`joined` by kernels."""

    @staticmethod
    def forward(
        ctx: Any, own: Tensor | None, own_lse: Tensor | None, x: Tensor, x_lse: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        from attlas.kernels.packed_rows import join

        own_lse = None if own_lse is None else own_lse.contiguous()
        x_lse, rows = x_lse.contiguous(), rows.contiguous()
        with torch.cuda.device_of(x):
            out, lse = join(own, own_lse, x, x_lse, rows)
        ctx.save_for_backward(own, own_lse, x, x_lse, rows)
        return out, lse

    @staticmethod
    def backward(ctx: Any, above: Tensor, of_sums: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both parts and of their sums."""
        from attlas.kernels.packed_rows import join_back

        own, own_lse, x, x_lse, rows = ctx.saved_tensors
        if not torch.is_grad_enabled():
            with torch.cuda.device_of(x):
                return *join_back(own, own_lse, x, x_lse, rows, above, of_sums), None
        found = gathered(None if own is None else (own, own_lse), x, x_lse, rows)
        given = (own, own_lse, x, x_lse)
        wanted = [t for t in given if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(
            found, wanted, (above, of_sums), create_graph=True, allow_unused=True
        ))  # fmt: skip
        return *(next(grads) if t is not None and t.requires_grad else None for t in given), None


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
