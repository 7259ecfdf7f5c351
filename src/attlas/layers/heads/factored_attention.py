"""Factored attention: the weights are parameters that know where two tokens stand, and nothing else.

    y_i = W_O concat_h Σ_j α^h[j − i] V_h x_j           no queries, no keys, no softmax

Displacements j − i wrap around a ring of `length` sites or a square of √length × √length, row by row;
"free" has a weight for each pair. Weights are of any sign and are not normalised: a hidden pair's is 0,
and the others stay as they are. Shorter sequences use the leading sites, longer ones are refused.

Cost: half of the plain projections and heads · n² · head_dim multiply-adds for the sum.
Reduces to no softmax attention; with α = 1 / length every token gets the mean of the values.
Source: "Are queries and keys always relevant? A case study on Transformer wave functions"; the square
and the initialisation are those of its authors' tutorial. Masks, causality and grouped value heads,
which spins do not need, are ours.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.masks import Mask


@mechanism("factored-attention", aliases=("factored",))
class Factored(Attention):
    """Attention with learned weights for displacements.

    Args:
        length: sites, and tokens at most.
        lattice: "ring", "square" or, not the same for all sites, "free".
    """

    has_own_position = True
    memory_law = "quadratic"

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, length: int = 512,
        lattice: Literal["ring", "square", "free"] = "ring", **options: Any,
    ) -> None:  # fmt: skip
        if lattice not in ("ring", "square", "free"):
            raise ValueError(f"lattice must be 'ring', 'square' or 'free', got {lattice!r}")
        if lattice == "square" and math.isqrt(at_least_one("length", length)) ** 2 != length:
            raise ValueError(f"length must be a square number on a square lattice, got {length}")
        self.length, self.lattice = at_least_one("length", length), lattice
        super().__init__(dim, heads, *args, **options)

    def make_projections(self) -> None:
        """Values, the output and α."""
        super().make_projections()
        del self.q_proj, self.k_proj
        free = self.lattice == "free"
        around = 2 * self.heads * self.length if free else self.heads + self.length
        sites = (self.length, self.length) if free else (self.length,)
        self.alpha = nn.Parameter(torch.empty(self.heads, *sites))
        nn.init.uniform_(self.alpha, -math.sqrt(6 / around), math.sqrt(6 / around))

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Values; ones stand for the queries and keys, by which a cache counts its tokens."""
        tokens = max(inputs.x.shape[1], inputs.key_positions.shape[-1])
        if tokens > self.length:
            raise ValueError(f"length={self.length} is the longest sequence, got {tokens} tokens")
        v = self.split_heads(self.v_proj(inputs.tokens))
        q = v.new_ones(len(v), self.heads, inputs.x.shape[1], 1)
        return q, torch.ones_like(v[..., :1]), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Tensor:
        """One product for the whole batch, whose rows share the weights unless a mask differs."""
        if self.training and self.dropout:
            return super().attend(q, k, v, inputs)
        shared = self.shown(mask, inputs)
        return torch.einsum("b h i j, b h j d -> b h i d", shared, ops.repeated(v, q.shape[1]))

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """α of all pairs, 0 where they may not meet, [batch, heads, queries, keys]."""
        return self.shown(mask, inputs).expand(len(q), -1, -1, -1)

    def shown(self, mask: Mask | Tensor | None, inputs: Inputs) -> Tensor:
        """As `weigh`; its batch is 1 where all rows have the same positions and mask."""
        rows, columns = inputs.positions[..., :, None], inputs.key_positions[..., None, :]
        weights = self.at(rows, columns)
        each = rearrange(weights, "h ... i j -> ... h i j") if weights.ndim == 4 else weights[None]
        queries, keys = each.shape[-2:]
        visible = ops.as_dense(mask, queries, keys, keys - queries, each.device)
        return each if visible is None else each.masked_fill(~visible, 0.0)

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """α between sites, [heads, ...]."""
        if self.lattice == "free":
            return self.alpha[:, rows, columns]
        if self.lattice == "ring":
            return self.alpha[:, (columns - rows) % self.length]
        side = math.isqrt(self.length)
        down, right = columns // side - rows // side, columns - rows
        return self.alpha[:, down % side * side + right % side]
