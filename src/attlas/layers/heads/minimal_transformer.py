"""Minimal transformer: attention by one similarity matrix, without value and output matrices.

    collapsed   head_h = softmax(x A_h xᵀ / √d) x_h          A_h [dim, dim] stands for W_Q W_Kᵀ
    symmetric   head_h = softmax(x W_h (x W_h)ᵀ / √d) x_h    W_h [dim, dim / heads]: W_Q is used as W_K
    x_h: slice h of the input; with `values=True` x W_V, and W_O after the heads

The paper's symmetric runs use W_Q as W_K, with one head or four; it collapses W_Q W_Kᵀ in runs of one
head, and says of several that a matrix of dim² each is more than the 2 · dim² / heads of both. Here a
layer of several heads is collapsed all the same unless it is symmetric; with two that costs as much.
(T Tᵀ of a triangle T is the paper's other symmetric form, of one head; it runs none.) It also drops the
feed-forward part, which is the model's affair: nothing here stands in for it.

Cost: scores dim instead of head_dim wide for every head unless W_Q is used twice; heads · dim² parameters
collapsed, dim² symmetric, instead of 4 · dim².
Reduces to softmax attention for A_h = W_Q W_Kᵀ and identities in place of W_V and W_O.
Source: "Reducing the Transformer Architecture to a Minimum". Slices x_h of the input as values of several
heads are ours, where the paper's runs leave values out with one head alone, and so are rotary positions,
which rotate each head_dim wide part of queries and keys.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.options import option


def _slices_as_keys(layer: MinimalTransformer, plain: Attention) -> None:
    """A_h with columns in slice h alone: W_Q where W_K, W_V and W_O are identities."""
    for name in ("k_proj", "v_proj", "o_proj"):
        weight = getattr(plain, name).weight
        weight.copy_(torch.eye(*weight.shape))
    blocks = torch.eye(layer.heads).repeat_interleave(layer.head_dim, dim=1)[..., None]
    queries = plain.q_proj.weight * blocks.to(plain.q_proj.weight)
    layer.similarity.weight.copy_(queries.flatten(0, 1))


@mechanism("minimal-transformer", reduces_to=Reduction("softmax", {}, _slices_as_keys))
class MinimalTransformer(Attention):
    """Attention with queries and keys collapsed into one matrix."""

    changes = ("score",)  # x A_h xᵀ, whose two factors `project` makes
    beyond = ("position: queries and keys are as wide as all heads, rotated part by part",)

    heads: int = option("heads; collapsed each has a matrix", default=1, at_least=1, kw_only=False)
    symmetric: bool = option("queries are the keys: W_Q is used as W_K", default=False)
    values: bool = option("keep the value and output matrices", default=False)

    def setup(self) -> None:
        """Refuse heads that are no slices of the input."""
        super().setup()
        if self.kv_heads != self.heads:
            raise ValueError(f"kv_heads must be heads={self.heads}: the input stands for the keys")
        if self.head_dim * self.heads != self.dim:
            raise ValueError(
                f"head_dim must be dim / heads = {self.dim / self.heads:g}: a slice of the input"
            )

    def make_projections(self) -> None:
        """A or W_Q, and the values' and the output's matrices where they are kept."""
        if self.values:
            super().make_projections()
            del self.q_proj, self.k_proj
        if self.symmetric:
            self.q_proj = nn.Linear(self.dim, self.dim, bias=self.bias)
        else:
            self.similarity = nn.Linear(self.dim, self.heads * self.dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """x A as queries and x as keys, or x W_Q as both; and values."""
        v = self.split_heads(self.v_proj(inputs.tokens) if self.values else inputs.tokens)
        if self.symmetric:
            q, k = (self.split_heads(self.q_proj(t)) for t in (inputs.x, inputs.tokens))
            return q, k, v
        q = rearrange(self.similarity(inputs.x), "b t (h c) -> b h t c", c=self.dim)
        return q, inputs.tokens[:, None], v

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Rotations of every head_dim wide part."""
        if self.symmetric:
            return super().position(q, k, inputs)
        narrow, wide = "b h t (c d) -> b (h c) t d", "b (h c) t d -> b h t (c d)"
        q, k = (rearrange(t, narrow, d=self.head_dim) for t in (q, k))
        q, k = super().position(q, k, inputs)
        return rearrange(q, wide, c=self.heads), rearrange(k, wide, c=self.heads)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads joined, and projected where that is kept."""
        if self.values:
            return super().output(heads, inputs)
        return rearrange(heads, "b h t d -> b t (h d)")
