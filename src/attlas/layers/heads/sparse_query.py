"""Sparse query attention (SQA): fewer query heads, so that scores cost less and not only the cache.

    d_h = dim / H,   H_q < H query heads,   H_kv ≤ H_q key and value heads,   W_O: H_q · d_h → dim

    variant     symmetric   standard   extreme   light
    H_q / H     1/2         1/2        1/4       3/4
    H_kv / H    1/2         1/4        1/4       1/4

Cost: multi-head attention's scores and sums times H_q / H, its cache times H_kv / H.
Reduces to grouped-query attention at H_q = H.
Source: "Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism with Query Heads
Reduction". It leaves H_q and H_kv free; the shares are those of the models it trained, "symmetric" by
definition too. "light" is an outlook there, H_q = 3/4 H, with nothing said of H_kv; ours is that of the
"standard" and grouped-query models. Where a share is no whole number of heads it is rounded down, to one
at least.
"""

from __future__ import annotations

from typing import Literal

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.options import option

#: Quarters of the full head count: query heads, key and value heads.
VARIANTS = {"symmetric": (2, 2), "standard": (2, 1), "extreme": (1, 1), "light": (3, 1)}


@mechanism(
    "sparse-query-attention", aliases=("sqa",),
    example={"heads": 8, "head_dim": 4, "query_heads": 4},
    reduces_to=Reduction(
        "softmax", {"kv_heads": 4}, lambda sqa, plain: plain.load_state_dict(sqa.state_dict())
    ),
)  # fmt: skip
class SparseQuery(Attention):
    """Attention with a share of the query heads.

    `heads` is given as the full count, which sets their width; the layer's own are the query heads.
    """

    changes = ("project", "output")

    kv_heads: int = option(
        "H_kv, a divisor of the query heads; the variant's unless given", at_least=1, kw_only=False,
        factory=lambda layer: min(layer.share(1), layer.query_heads or layer.share(0)),
    )  # fmt: skip
    variant: Literal["symmetric", "standard", "extreme", "light"] = option(
        "which shares of the heads", default="symmetric"
    )
    query_heads: int | None = option("H_q; None: the variant's", default=None, at_least=1)

    def setup(self) -> None:
        """How many query heads there are, which the projections need."""
        queries = self.query_heads or self.share(0)
        if queries > self.heads:
            raise ValueError(f"query_heads must be at most heads={self.heads}, got {queries}")
        self.heads = queries
        super().setup()

    def share(self, which: int) -> int:
        """The variant's share of `heads`, of the query heads (0) or the key heads (1)."""
        return max(1, self.heads * VARIANTS[self.variant][which] // 4)
