"""Top links: the keys that each query attends to most.

    index(i) = columns of the k largest A_ij, largest first;    weight(i) = these A_ij

Cost: a top-k per row of weights, held a block at a time; 2k numbers a query.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach.call import Call
from attlas.catalog.registry import mechanism
from attlas.options import option
from attlas.parts.record.rows import RowRecorder


@mechanism("top-links", paper="")
class TopLinks(RowRecorder):
    """Records each query's strongest links.

    The result is {"index": [layers, batch, heads, tokens, k], "weight": likewise}; where a query sees
    fewer than k keys, the index is -1 and the weight 0.
    """

    k: int = option("links per query", default=8, at_least=1, kw_only=False)

    def measure(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Float[Tensor, "batch heads query k 2"]:
        """(weight, column) pairs; columns are exact in float64."""
        missing = max(0, self.k - weights.shape[-1])
        top = weights.topk(min(self.k, weights.shape[-1]), dim=-1)
        columns = keys.expand(*weights.shape[:2], keys.shape[-1]).long()
        columns = columns[:, :, None].expand(-1, -1, weights.shape[2], -1).gather(-1, top.indices)
        columns = columns.masked_fill(top.values == 0, -1)
        pairs = torch.stack([top.values.double(), columns.double()], dim=-1)
        empty = torch.tensor([0.0, -1.0], dtype=pairs.dtype, device=pairs.device)
        return torch.cat([pairs, empty.expand(*pairs.shape[:3], missing, 2)], dim=3)

    def result(
        self,
    ) -> dict[
        str,
        Float[Tensor, "layers batch heads tokens k"] | Int[Tensor, "layers batch heads tokens k"],
    ]:
        """Index and weight of the links."""
        pairs: Tensor = super().result()
        return {"index": pairs[..., 1].long(), "weight": pairs[..., 0].float()}
