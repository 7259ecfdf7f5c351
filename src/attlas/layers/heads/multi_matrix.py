"""Multi-matrix factorization attention (MFA): many wide heads, factored queries, one key and value.

    q_c = (x S_q) Q_c,   S_q: dim × C shared, Q_c: C × C for each head;   k = x S_k,   v = x S_v
    y = concat_c(softmax(q_c kᵀ / √C) v) W_O
    MFA-KR: v = k + α ⊙ (k N),   α = 0 at first;   keys alone are cached, positions applied afterwards

Cost: plain attention with as many heads; 2 C numbers cached a token, C with reused keys.
Reduces to multi-query attention with the query projection S_q Q_c (and with V's projection K's).
Source: "Multi-matrix Factorization Attention". The norm between S_q and Q_c (`query_norm`) and a width
of S_q of its own are Step-3's, by the same authors. No code of MFA-KR is published: that α is a number
a channel and that N acts on unrotated keys is our reading of the paper's W_V = W_K + α N W_K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.options import option


def _multiplied(layer: MultiMatrix, plain: Attention) -> None:
    """Multi-query attention whose query projection is the product of the factors."""
    plain.load_state_dict(layer.state_dict(), strict=False)
    plain.q_proj.weight.copy_(layer.q_up.weight @ layer.q_down.weight)


def _ungated(layer: MultiMatrixKeyReuse, plain: Attention) -> None:
    """Closed gates leave keys for values."""
    layer.gate.zero_()
    _multiplied(layer, plain)
    plain.v_proj.load_state_dict(layer.k_proj.state_dict())


@mechanism("multi-matrix-factorization", aliases=("mfa",),
           reduces_to=Reduction("multi-query-attention", {}, _multiplied))  # fmt: skip
class MultiMatrix(Attention):
    """Attention with factored queries of many heads, one key head and one value head."""

    kv_heads: int = option(
        "key and value heads, always one", default=1, at_least=1, at_most=1, kw_only=False
    )
    query_rank: int = option(
        "width that S_q gives; C = head_dim unless given", factory=lambda layer: layer.head_dim,
        at_least=1,
    )  # fmt: skip
    query_norm: bool = option("an RMS norm between S_q and Q_c", default=False)

    def make_projections(self) -> None:
        """The two factors of the queries in the place of their projection."""
        super().make_projections()
        del self.q_proj
        self.q_down = nn.Linear(self.dim, self.query_rank, bias=self.bias)
        norm = nn.RMSNorm(self.query_rank, eps=1e-5)
        self.q_norm = norm if self.query_norm else nn.Identity()
        self.q_up = nn.Linear(self.query_rank, self.heads * self.head_dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries through both factors; one key and one value."""
        q = self.q_up(self.q_norm(self.q_down(inputs.x)))
        k, v = self.k_proj(inputs.tokens), self.v_proj(inputs.tokens)
        return self.split_heads(q), k[:, None], v[:, None]


@mechanism("mfa-key-reuse", paper="multi-matrix-factorization", aliases=("mfa-kr",),
           reduces_to=Reduction("multi-query-attention", {}, _ungated))  # fmt: skip
class MultiMatrixKeyReuse(MultiMatrix):
    """Multi-matrix factorization attention whose values are made of the cached keys."""

    beyond = ("position: keys are rotated after the cache, since values are made of them before",)

    def make_projections(self) -> None:
        """As without reuse; N and its gate α in the place of the value projection."""
        super().make_projections()
        del self.v_proj
        self.mix = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.gate = nn.Parameter(torch.zeros(self.head_dim))

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys; values of no width, for the cache."""
        q = self.q_up(self.q_norm(self.q_down(inputs.x)))
        k = self.k_proj(inputs.tokens)[:, None]
        return self.split_heads(q), k, k[..., :0]

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries rotated; keys are cached as they are, since values are made of them."""
        return self.position_encoding.rotate(q, inputs.positions), k

    def restore(self, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Values made of all keys, and then the keys rotated."""
        rotated = self.position_encoding.rotate(k, inputs.positions_of(k.shape[2]))
        return rotated, k + self.gate * self.mix(k)
