"""Grouped and multi-query attention: query heads share key and value heads.

    out_h = softmax(q_h K_g(h)ᵀ / √d) V_g(h),   g(h) = ⌊h · kv_heads / heads⌋;   multi-query: one g

Cost: the cache and the bytes read for a decoded token shrink by heads / kv_heads.
Reduces to multi-head attention whose key and value heads are copies within each group.
Sources: "Fast Transformer Decoding: One Write-Head is All You Need" (the paper has no 1/√d, which it
leaves to the initialisation); "GQA: Training Generalized Multi-Query Transformer Models from
Multi-Head Checkpoints" (groups, and the mean-pooled conversion).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.options import option


def _copy_groups(grouped: Attention, multi_head: Attention) -> None:
    """Give the multi-head layer the grouped layer's weights, each group's copied to its heads."""
    repeats = grouped.heads // grouped.kv_heads
    for name, parameter in grouped.state_dict().items():
        target = multi_head.state_dict()[name]
        if name.startswith(("k_proj", "v_proj")):
            heads = parameter.view(grouped.kv_heads, grouped.head_dim, -1)
            parameter = heads.repeat_interleave(repeats, dim=0).view(target.shape)
        target.copy_(parameter)


@mechanism(
    "grouped-query-attention", paper="", aliases=("gqa",), example={"kv_heads": 2},
    reduces_to=Reduction("softmax", {"kv_heads": 2}, _copy_groups),
)  # fmt: skip
class GroupedQuery(Attention):
    """Multi-head attention with `kv_heads` key and value heads, a divisor of `heads`."""

    changes = ("project",)

    kv_heads: int = option(
        "key and value heads, a divisor of heads", default=1, at_least=1, kw_only=False
    )

    @classmethod
    def from_multi_head(cls, layer: Attention, kv_heads: int = 1) -> GroupedQuery:
        """Convert a multi-head layer: each group's key and value heads are averaged.

        Raises:
            ValueError: a layer that has grouped heads already, or groups that do not divide.
        """
        if layer.kv_heads != layer.heads:
            raise ValueError(f"layer must have a key head a query head, got {layer.kv_heads}")
        made = cls(
            layer.dim, layer.heads, kv_heads, layer.head_dim, causal=layer.causal,
            mask=layer.own_mask, position=layer.position_encoding, bias=layer.bias,
            dropout=layer.dropout, layer_idx=layer.layer_idx,
        )  # fmt: skip
        made.load_state_dict(made.pooled(layer.state_dict()))
        return made.to(layer.q_proj.weight)

    def load_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Take over a plain layer's weights, key and value heads averaged where it has one a head."""
        return super().load_from(self.pooled(weights))

    def pooled(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights in which a multi-head layer's key and value heads are averaged by groups."""
        rows = self.heads * self.head_dim
        return {
            name: _pooled(weight, self.heads, self.kv_heads)
            if name.startswith(("k_proj", "v_proj")) and len(weight) == rows else weight
            for name, weight in weights.items()
        }  # fmt: skip


@mechanism(
    "multi-query-attention", aliases=("mqa",), reduces_to=Reduction("softmax", {}, _copy_groups)
)
class MultiQuery(GroupedQuery):
    """All query heads share one key head and one value head."""

    def setup(self) -> None:
        """Refuse more key heads than one."""
        if self.kv_heads != 1:
            raise ValueError(
                f"kv_heads must be 1 here, got {self.kv_heads}; see grouped-query-attention"
            )
        super().setup()


def _pooled(parameter: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Mean over each group's heads of a projection's rows."""
    rows = parameter.view(kv_heads, heads // kv_heads, parameter.shape[0] // heads, -1)
    return torch.mean(rows, dim=1).view(-1, *parameter.shape[1:])
