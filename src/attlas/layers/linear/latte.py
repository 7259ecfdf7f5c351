"""Latte: queries and keys meet in latent variables, of which a state of constant size tells everything.

    p(l | t) = softmax_l(q_tl)        p(s | l) = e^{k_sl} / Σ_r e^{k_rl}
    weights_ts = Σ_l p(l | t) p(s | l)        y = W_O concat_h weights_h v_h

q and k have one channel for each of a head's latents, and s and r run over the tokens that t sees. The
causal form is a recurrence whose decays keep it normalised, so that no large k overflows or drowns:

    Z_tl = log Σ_{s≤t} e^{k_sl}        S_t = diag(e^{Z_{t−1} − Z_t}) S_{t−1} + e^{k_t − Z_t} v_tᵀ
    y_t  = S_tᵀ p(· | t)

Dropout falls on p(l | t), so that training stays linear too.

Cost: 2·n·L·d multiply-adds a head, memory linear in n; one state of L × (d + 1) a head while decoding.
Pair-by-pair masks need the n² weights.
Reduces to softmax pooling of the visible values, the same for every query, at one latent.
Source: "Latent Attention for Linear Time Transformers" and its authors' program, which has no scale on q
and k, no biases, as many latents as channels in its language models, and the initialisation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas import ops
from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option

#: Log of nothing at all, which sums of logarithms and their gradients can still be taken with.
NOTHING = -1e30
#: Deviation of a normal distribution cut at two deviations.
CUT = 0.87962566103423978


@mechanism("latte")
class Latte(RecurrentAttention):
    """Attention through a few latent variables."""

    supports = replace(RecurrentAttention.supports, position=False)
    beyond = ("project: queries and keys have a channel for each latent variable",)
    normalized = False

    latents: int = option(
        "latent variables of a head; head_dim unless given", at_least=1,
        factory=lambda layer: layer.head_dim,
    )  # fmt: skip

    def make_projections(self) -> None:
        """Projections to latents and values, each of unit variance for inputs of unit variance."""
        super().make_projections()
        self.q_proj = nn.Linear(self.dim, self.heads * self.latents, bias=self.bias)
        self.k_proj = nn.Linear(self.dim, self.kv_heads * self.latents, bias=self.bias)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            std = projection.in_features**-0.5 / CUT
            nn.init.trunc_normal_(projection.weight, std=std, a=-2 * std, b=2 * std)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the latents for queries and keys, and values."""
        q, k = (
            rearrange(logits, "b t (h l) -> b h t l", l=self.latents)
            for logits in (self.q_proj(inputs.x), self.k_proj(inputs.tokens))
        )
        return q, k, self.split_heads(self.v_proj(inputs.tokens))

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """p(l | t) in float32 at least, and the logits of keys."""
        wide = torch.promote_types(q.dtype, torch.float32)
        shares = torch.dropout(q.to(wide).softmax(-1), self.dropout, self.training)
        return shares, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The recurrence, with dropout too; all pairs where a mask asks for them."""
        if inputs.runs_along(self.pattern):
            return self.recur(q, k, v, inputs)
        return self.aggregate(self.weigh(q, k, inputs), v, inputs)

    def terms(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Gates]:
        """p(l | t), p(s | l) of the keys so far, and how that of earlier keys shrinks with each."""
        q, k = self.features(q, k, inputs)
        # Z is summed up in float64: what it is off by, all weights would be off by.
        logits = ops.repeated(k, q.shape[1]).double()
        gates: Gates = {}
        padding = None if inputs.valid_now is None else ~inputs.valid_now[:, None, :, None]
        if padding is not None:  # which may hold anything
            logits = logits.masked_fill(padding, NOTHING)
        total = logits.logsumexp(2, keepdim=True)
        if inputs.looks_back(self.pattern):
            before = inputs.recall("total")
            if before is None:
                before = torch.full_like(logits[:, :, :1], NOTHING)
            totals = torch.cat((before, logits), dim=2).logcumsumexp(2)
            total, gates["log_decay"] = totals[:, :, 1:], (-totals.diff(dim=2)).clamp(max=0.0)
            inputs.remember("total", totals[:, :, -1:])
        shares = (logits - total).exp().to(q.dtype)
        return q, shares if padding is None else shares.masked_fill(padding, 0.0), gates

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Σ_l p(l | t) p(s | l), latent by latent.

        Raises:
            ValueError: a cache, whose state tells no more which token wrote what.
        """
        inputs.refuse_weights(inputs.cache is not None)
        visible = inputs.visible(q, k)
        shares, k = self.features(q, k, inputs)
        k = ops.repeated(k, q.shape[1]).to(shares.dtype)
        weights = shares.new_zeros(*q.shape[:3], k.shape[2])
        for share, logits in zip(shares.unbind(-1), k.unbind(-1), strict=True):
            rows = logits[:, :, None]
            if visible is not None:
                rows = rows.masked_fill(~visible, -torch.inf)
            weights = weights + share[..., None] * ops.softmax(rows)
        return weights.to(q.dtype)

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """One vector for each head and query; what is dropped has been dropped from p(l | t)."""
        return ops.grouped_product(weights, v)
