"""Multi-head attention from one head's projections and an embedding for each head (MHE).

    multiplicative   q_h = x W_Q ⊙ (1 + e_h)       additive   q_h = x W_Q + e_h
    keys and values alike, each with its own e_h;   then softmax heads, joined and projected

W_Q, W_K and W_V are one head wide. Without rotations the additive keys' embeddings shift whole rows
of scores, which softmax does not see.

Cost: plain attention; the projections shrink by the number of heads, 3 · heads · head_dim come on top.
Reduces to multi-head attention whose projections are these products, here with multiplied embeddings.
Source: "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient
Multi-head Attention". No code is published: the embeddings' initialisation, N(0, 0.02²), is that of
the position embeddings after which the paper models them, and grouped keys are ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option


def _products(mhe: HeadEmbedding, plain: Attention) -> None:
    """The plain layer's projections: the shared ones, scaled for each head."""
    for name in ("q", "k", "v"):
        shared = getattr(mhe, f"{name}_proj").weight
        each = torch.einsum("h d, d c -> h d c", 1 + getattr(mhe, f"{name}_embed"), shared)
        getattr(plain, f"{name}_proj").weight.copy_(each.flatten(0, 1))
    plain.o_proj.load_state_dict(mhe.o_proj.state_dict())


@mechanism("head-embedding-mha", aliases=("mhe",), reduces_to=Reduction("softmax", {}, _products))
class HeadEmbedding(Attention):
    """Attention whose heads share projections and differ by embeddings."""

    claims = (
        Claim(
            "one head's projections and an embedding a head keep nearly all of the quality",
            task="shakespeare-bytes", better="lower", margin=0.05, steps=500, batch=16,
        ),
    )  # fmt: skip

    mode: Literal["multiplicative", "additive"] = option(
        "how an embedding enters", default="multiplicative"
    )

    def make_projections(self) -> None:
        """Projections one head wide, an embedding for each head, and the output."""
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(self.dim, self.head_dim, bias=self.bias) for _ in range(3)
        )
        self.q_embed, self.k_embed, self.v_embed = (
            nn.Parameter(torch.randn(heads, self.head_dim) * 0.02)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        self.o_proj = nn.Linear(self.heads * self.head_dim, self.dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The shared query, key and value in every head's variant."""
        tokens = inputs.tokens
        return (
            self.variants(self.q_proj(inputs.x), self.q_embed),
            self.variants(self.k_proj(tokens), self.k_embed),
            self.variants(self.v_proj(tokens), self.v_embed),
        )

    def variants(self, shared: Tensor, embedding: Tensor) -> Tensor:
        """[batch, tokens, head_dim] once for each head of the embedding."""
        one, each = rearrange(shared, "b t d -> b 1 t d"), embedding[:, None]
        return one * (1 + each) if self.mode == "multiplicative" else one + each
