"""Neural attention: a small network, not a product, says how well a query and a key fit.

    s_ij    = w₃ · relu(W₂ relu(W₁ [P_q q_i ; P_k k_j] + b₁) + b₂)       widths 2p → p → p/2 → 1
    weights = softmax(s)                                                 without 1/√d

The network is the same for all heads. W₁ is the sum of a part for queries and one for keys, which are
applied token by token. What is made for every pair, p numbers and then p/2, lives for one block of
queries at a time and is made again for the backward pass.

Cost: p²/2 + 3p/2 multiply-adds for each score and head. A cache holds p numbers for a key instead of d.
Reduces to the mean of the visible values at w₃ = 0.
Source: "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models". Its
program adds a bias to every score, which the softmax does not feel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option
from attlas.supports import Supports
from attlas.tracing import stretches

#: Queries at a time.
BLOCK = 32


@mechanism("neural-attention", example={"projection_dim": 8})
class Neural(Attention):
    """Attention with a feed-forward network as its score."""

    claims = (
        Claim(
            "a small network for every pair scores better than a dot product",
            task="shakespeare-bytes", better="lower", steps=500, batch=16,
        ),
    )  # fmt: skip

    supports = Supports()
    beyond = (
        "position: queries and keys pass their shares of the first layer, which a cache keeps",
    )

    projection_dim: int = option(
        "p, numbers that the network reads of a query and of a key; head_dim / 32 unless given",
        factory=lambda layer: max(2, layer.head_dim // 32), at_least=2,
    )  # fmt: skip

    def setup(self) -> None:
        """The network."""
        super().setup()
        width = self.projection_dim
        self.q_narrow, self.k_narrow = (nn.Linear(self.head_dim, width) for _ in range(2))
        self.first = nn.Linear(2 * width, width)
        self.second = nn.Linear(width, width // 2)
        self.third = nn.Linear(width // 2, 1, bias=False)

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys rotated by their position, then their shares of the first layer."""
        q, k = super().position(q, k, inputs)
        for_q, for_k = self.first.weight.chunk(2, dim=1)
        return linear(self.q_narrow(q), for_q, self.first.bias), linear(self.k_narrow(k), for_k)

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Scores of all pairs, a block of queries at a time."""
        parts = [q[:, :, rows] for rows in stretches(q.shape[2], BLOCK)]
        many = len(parts) > 1
        return torch.cat([ops.recomputed(self.pairs, part, k, when=many) for part in parts], dim=2)

    def pairs(self, q: Tensor, k: Tensor) -> Tensor:
        """The network's answers for q with k, all that it makes on the way in memory."""
        grouped = q.unflatten(1, (k.shape[1], -1))[..., None, :]
        hidden = (grouped + k[:, :, None, None]).relu()
        scores: Tensor = self.third(self.second(hidden).relu())
        return scores.squeeze(-1).flatten(1, 2)
