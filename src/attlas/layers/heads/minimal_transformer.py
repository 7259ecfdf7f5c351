"""Minimal transformer: attention by one similarity matrix, without value and output matrices.

    collapsed   head_h = softmax(x A_h xᵀ / √d) x_h          A_h [dim, dim] stands for W_Q W_Kᵀ
    symmetric   A_h = T_h T_hᵀ,   T_h lower triangular       half as many numbers
    x_h: slice h of the input; with `values=True` x W_V, and W_O after the heads

The paper also drops the feed-forward part, which is the model's affair: nothing here stands in for it.

Cost: scores dim instead of head_dim wide for every head; heads · dim² parameters (half if symmetric)
instead of 4 · dim², so that it saves with few heads: the paper has one or four.
Reduces to softmax attention for A_h = W_Q W_Kᵀ and identities in place of W_V and W_O.
Source: "Reducing the Transformer Architecture to a Minimum". T's triangle rests on a third party's
program; the heads' own full A_h and slices x_h are ours where the paper's text leaves them open, and
so are rotary positions, which rotate each head_dim wide part of x A_h and x.
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

    heads: int = option("heads, each with a matrix", default=1, at_least=1, kw_only=False)
    symmetric: bool = option("the matrix is a triangle times its transpose", default=False)
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
        """A or T, and the values' and the output's matrices where they are kept."""
        if self.values:
            super().make_projections()
            del self.q_proj, self.k_proj
        if self.symmetric:
            triangle = self.dim * (self.dim + 1) // 2
            spread = (3 * self.dim) ** -0.5  # that of nn.Linear
            self.triangle = nn.Parameter(torch.randn(self.heads, triangle) * spread)
        else:
            self.similarity = nn.Linear(self.dim, self.heads * self.dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """x A or x T as queries, x or x T as keys, each as wide as the input; and values."""
        x, tokens = inputs.x[:, None], inputs.tokens[:, None]
        v = self.split_heads(self.v_proj(inputs.tokens) if self.values else inputs.tokens)
        if self.symmetric:
            factor = self.factor()
            return x @ factor, tokens @ factor, v
        q = rearrange(self.similarity(inputs.x), "b t (h c) -> b h t c", c=self.dim)
        return q, tokens, v

    def factor(self) -> Tensor:
        """T of every head, [heads, dim, dim]."""
        rows, columns = torch.tril_indices(self.dim, self.dim, device=self.triangle.device)
        square = self.triangle.new_zeros(self.heads, self.dim, self.dim)
        each = torch.arange(self.heads, device=rows.device)[:, None]
        return square.index_put((each, rows, columns), self.triangle)

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Rotations of every head_dim wide part."""
        narrow, wide = "b h t (c d) -> b (h c) t d", "b (h c) t d -> b h t (c d)"
        q, k = (rearrange(t, narrow, d=self.head_dim) for t in (q, k))
        q, k = super().position(q, k, inputs)
        return rearrange(q, wide, c=self.heads), rearrange(k, wide, c=self.heads)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads joined, and projected where that is kept."""
        if self.values:
            return super().output(heads, inputs)
        return rearrange(heads, "b h t d -> b t (h d)")
