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
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports


@mechanism("factored-attention", aliases=("factored",))
class Factored(Attention):
    """Attention with learned weights for displacements."""

    supports = Supports(position=False, memory="quadratic")
    beyond = ("project: no queries and keys are made",)

    length: int = option("sites, and tokens at most", default=512, at_least=1)
    lattice: Literal["ring", "square", "free"] = option(
        "on which displacements are taken; free has a weight for each pair of sites", default="ring"
    )

    def setup(self) -> None:
        """α; a square lattice has a square number of sites."""
        if self.lattice == "square" and math.isqrt(self.length) ** 2 != self.length:
            raise ValueError(f"length must be square on a square lattice, got {self.length}")
        super().setup()
        free = self.lattice == "free"
        around = 2 * self.heads * self.length if free else self.heads + self.length
        sites = (self.length, self.length) if free else (self.length,)
        self.alpha = nn.Parameter(torch.empty(self.heads, *sites))
        nn.init.uniform_(self.alpha, -math.sqrt(6 / around), math.sqrt(6 / around))

    def make_projections(self) -> None:
        """Values and the output."""
        super().make_projections()
        del self.q_proj, self.k_proj

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Values; ones stand for the queries and keys, by which a cache counts its tokens."""
        tokens = max(inputs.x.shape[1], inputs.key_positions.shape[-1])
        if tokens > self.length:
            raise ValueError(f"length={self.length} is the longest sequence, got {tokens} tokens")
        v = self.split_heads(self.v_proj(inputs.tokens))
        q = v.new_ones(len(v), self.heads, inputs.x.shape[1], 1)
        return q, torch.ones_like(v[..., :1]), v

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """α of all pairs."""
        return self.shared(inputs).expand(len(q), -1, -1, -1)

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """The scores themselves, 0 where a pair is hidden."""
        return scores.masked_fill(scores == -torch.inf, 0.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """One product for the whole batch, whose rows share the weights unless a mask differs."""
        if self.training and self.dropout:
            return super().attend(q, k, v, inputs)
        weights, visible = self.shared(inputs), inputs.visible(q, k)
        weights = weights if visible is None else weights.masked_fill(~visible, 0.0)
        return torch.einsum("b h i j, b h j d -> b h i d", weights, ops.repeated(v, q.shape[1]))

    def shared(self, inputs: Inputs) -> Tensor:
        """As `score`; its batch is 1 where all rows have the same positions."""
        keys = inputs.positions_of(inputs.key_positions.shape[-1])
        weights = self.at(inputs.positions[..., :, None], keys[..., None, :])
        return rearrange(weights, "h ... i j -> ... h i j") if weights.ndim == 4 else weights[None]

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """α between sites, [heads, ...]."""
        if self.lattice == "free":
            return self.alpha[:, rows, columns]
        if self.lattice == "ring":
            return self.alpha[:, (columns - rows) % self.length]
        side = math.isqrt(self.length)
        down, right = columns // side - rows // side, columns - rows
        return self.alpha[:, down % side * side + right % side]
