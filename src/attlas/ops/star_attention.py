"""Star attention, phase two: a query meets the keys of all hosts, each by itself, merged by their sums.

    out_h, lse_h = softmax(q k_hᵀ · scale) v_h        h: a host, with its block of the context
    lse = log Σ_h exp(lse_h)      out = Σ_h exp(lse_h − lse) · out_h

The last host holds the queries' own keys too, causal among them. Hosts are simulated in one process. How
their keys come about, phase one, is `star-prefill`.

Cost: that of attention; of each host only a sum and a number a query travel.
Reduces to attention over all keys, whatever the number of hosts.
Source: "Star Attention: Efficient LLM Inference over Long Sequences".
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attlas.catalog.kinds import OP
from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.masks import causal
from attlas.ops.attend import attend
from attlas.ops.reference import merge


@mechanism("star-attention", kind=OP, example={"hosts": 3})
def star_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys v_dim"],
    *,
    hosts: int = 4,
    scale: float | None = None,
) -> tuple[Float[Tensor, "batch heads queries v_dim"], Float[Tensor, "batch heads queries"]]:
    """(out, lse) of queries whose keys stand last, behind a context that hosts share out; differentiable.

    Args:
        q: queries.
        k: keys of the context, and behind them those of the queries.
        v: values likewise.
        hosts: among which the context is shared out, in blocks of equal length but the last.
        scale: of the products; 1/√dim unless given.

    Raises:
        ValueError: fewer hosts than one, or fewer keys than queries.
    """
    at_least_one("hosts", hosts)
    context = k.shape[2] - q.shape[2]
    if context < 0:
        raise ValueError(f"k must hold the queries' own keys last, got {k.shape[2]} of {q.shape[2]}")
    size = max(1, -(-context // hosts))
    ends = [*range(size, context, size), k.shape[2]]
    parts = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        pattern = causal if end == k.shape[2] else None
        parts.append(
            attend(
                q, k[:, :, start:end], v[:, :, start:end], mask=pattern, scale=scale,
                q_offset=context - start, return_lse=True,
            )
        )  # fmt: skip
    return merge(parts)
