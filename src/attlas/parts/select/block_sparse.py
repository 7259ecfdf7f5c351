"""Block-sparse prefill: each block of queries reads the blocks whose mean keys fit its mean query best.

    score(i, j) = mean(q_i) · mean(k_j)      the k best blocks j that begin no later than block i

Neither the own block nor the first is kept besides. Decoding reads everything.

Cost: (n/b)² products of means, and k·b keys a query. Reduces to full attention where k blocks are the
whole prompt.

Source: a pattern of "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
Attention".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from attlas import masks, ops
from attlas.attach.thinned import Text, Thinned
from attlas.catalog.registry import mechanism
from attlas.masks import Mask
from attlas.options import option


@mechanism("block-sparse", paper="", example={"keep": 2, "size": 4})
class BlockSparse(Thinned):
    """Each block of queries reads the blocks of keys whose mean fits its own mean best."""

    everything: ClassVar[dict[str, Any]] = {"keep": 10**6}
    comparable: ClassVar[tuple[str, ...]] = ("(keep=9)", "(keep=4)")

    keep: int = option("blocks of keys that each block of queries reads", default=100, at_least=1)
    size: int = option("tokens of a block", default=64, at_least=1)

    def pattern(self, text: Text) -> Mask:
        """The best blocks of each block of queries."""
        q, k = ops.page_means(text.q, self.size), ops.page_means(text.k, self.size)
        row, block = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
        begin, first = block * self.size, text.offset + row[:, None] * self.size
        scores = ops.grouped_product(q, k.mT)
        scores = scores.masked_fill(begin >= first + self.size, -torch.inf)
        # Behind a past that fills no block, one begins among the queries: it is read beside the others.
        beside = (begin > first) & (begin < first + self.size)
        count = self.keep + (text.offset % self.size > 0)
        scores = scores.masked_fill(beside, torch.inf)
        best = ops.best_pages(scores.flatten(1, 2), count).unflatten(1, scores.shape[1:3])
        # What is not there stands for −∞, and may come before blocks that are: it goes behind them.
        best = torch.where(best < 0, k.shape[2], best).sort(dim=-1).values
        best = torch.where(best == k.shape[2], -1, best)
        return masks.Pages(best, (self.size, self.size), first=text.offset)
