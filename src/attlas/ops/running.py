"""Running means along a sequence, in the precision of float32 and at the speed of matrix products."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from attlas.ops.exact import exact
from attlas.ops.fused import fused

#: Tokens summed by one triangular product.
CHUNK = 64


@exact
def running_mean(
    x: Float[Tensor, "batch heads tokens width"], count: Float[Tensor, "#batch 1 tokens 1"],
    before: Float[Tensor, "batch heads 1 width"] | None = None,
) -> tuple[Float[Tensor, "batch heads tokens width"], Float[Tensor, "batch heads 1 width"]]:
    """(before + Σ_{j ≤ i} x_j) / count_i for every token i, and the sum of all in float32 or more.

    Half precision on a GPU goes by chunks: sums of whole chunks in float32, the tokens inside by a
    triangular product that divides by the count at once. A plain `cumsum` there takes as long as
    attention.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not (x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.shape[2] > CHUNK):
        sums = x.to(dtype).cumsum(2)
        sums = sums if before is None else sums + before
        return (sums / count.to(dtype)).to(x.dtype), sums[:, :, -1:]
    tokens, extra = x.shape[2], -x.shape[2] % CHUNK
    inverse = pad(count.to(dtype).reciprocal(), (0, 0, 0, extra)).unflatten(2, (-1, CHUNK))
    chunks = pad(x, (0, 0, 0, extra)).unflatten(2, (-1, CHUNK))
    totals = chunks.sum(-2, dtype=dtype)
    earlier = totals.cumsum(2) - totals
    earlier = earlier if before is None else earlier + before
    total = earlier[:, :, -1:] + totals[:, :, -1:]
    inside = torch.ones(CHUNK, CHUNK, dtype=dtype, device=x.device).tril() * inverse
    means = _joined(earlier.unsqueeze(-2), inverse, inside.to(x.dtype) @ chunks)
    return means.flatten(2, 3)[:, :, :tokens], total


@fused
def _joined(earlier: Tensor, inverse: Tensor, inside: Tensor) -> Tensor:
    """The means from what stands before the chunks and in them."""
    return (earlier * inverse + inside).to(inside.dtype)
