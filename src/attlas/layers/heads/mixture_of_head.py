"""Mixture-of-head attention (MoH): every token switches heads on and off by a gate for each.

    y_t = Σ_h g_h(x_t) · head_h(x_t) W_O^h
    routed heads   p = softmax(W_r x),  g = a₂ · K · p_h / Σ_kept p  for the K largest p, else 0
    shared heads   g = a₁ · S · softmax(W_s x)_h,   always on, the first S;   (a₁, a₂) = 2 softmax(W_a x)
    added to the loss: β · R · Σ_h mean_t(p_h) · mean_t(h kept),   R = heads − S

`router="query-norm"` has no parameters and converts a pretrained layer (`load_from`): p is the softmax of
‖q_h‖ (unrotated) over its deviation among the routed heads; gates are 0 or 1, with p's gradient.

Cost: plain attention's and 2 + heads more outputs a token; switched off heads are computed all the same.
Reduces to multi-head attention when all heads are active and the routers are 0.
Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention". The factors 2, S and K, and R, are in
the authors' code alone; it averages the loss over layers, where a model here sums. The straight-through
gradient, which their published inference code does not show, is what the paper says.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option


def _all_on(moh: MixtureOfHead, plain: Attention) -> None:
    """Routers of zeros give every head the gate 1."""
    for router in (moh.router, moh.shared_router, moh.balance):
        router.weight.zero_()
    plain.load_state_dict(moh.state_dict(), strict=False)


@mechanism(
    "mixture-of-head", aliases=("moh",),
    example={"heads": 4, "shared_heads": 1, "routed_active": 2},  # a lone kept head's gate is 1
    reduces_to=Reduction("softmax", {"shared_heads": 2, "routed_active": 2}, _all_on),
)  # fmt: skip
class MixtureOfHead(Attention):
    """Attention whose heads are gated for each token."""

    claims = (
        Claim(
            "with three quarters of its heads it is as good as multi-head attention",
            ours="mixture-of-head(shared_heads=1, routed_active=2)", task="shakespeare-bytes",
            better="lower", margin=0.02, steps=500, batch=16,
        ),
    )  # fmt: skip

    shared_heads: int = option(
        "S, heads always on; half of them unless given", at_least=0,
        factory=lambda layer: layer.heads // 2,
    )  # fmt: skip
    routed_active: int = option(
        "K, the other heads that a token keeps; a quarter of all unless given", at_least=0,
        factory=lambda layer: min(max(1, layer.heads // 4), layer.heads - layer.shared_heads),
    )  # fmt: skip
    routing: Literal["learned", "query-norm"] = option(
        "what routes: a learned matrix, or the queries' lengths, for pretrained models",
        default="learned", alias="router",
    )  # fmt: skip
    load_balance: float = option("β, weight of the balance among the added losses", default=0.01)

    def setup(self) -> None:
        """A router for each choice that there is."""
        super().setup()
        self.routed_heads = self.heads - self.shared_heads
        if self.shared_heads > self.heads:
            raise ValueError(f"shared_heads must be 0 to {self.heads}, got {self.shared_heads}")
        if not min(1, self.routed_heads) <= self.routed_active <= self.routed_heads:
            raise ValueError(
                f"routed_active must be 1 to {self.routed_heads} of {self.heads} heads, "
                f"got {self.routed_active}"
            )
        self.learned = self.routing == "learned"
        if self.learned and self.routed_heads:
            self.router = nn.Linear(self.dim, self.routed_heads, bias=False)
        if self.learned and self.shared_heads > 1:
            self.shared_router = nn.Linear(self.dim, self.shared_heads, bias=False)
        if self.learned and self.shared_heads and self.routed_heads:
            self.balance = nn.Linear(self.dim, 2, bias=False)

    def head_gates(self, inputs: Inputs) -> Tensor:
        """Every head's gate for every token, [batch, tokens, heads]; the shared heads come first."""
        x = inputs.x
        shared = x.new_ones(*x.shape[:2], self.shared_heads)
        if self.learned and self.shared_heads > 1:
            shared = self.shared_router(x).softmax(-1) * self.shared_heads
        if not self.routed_heads:
            return shared
        p = (self.router(x) if self.learned else self.query_norms(x)).softmax(-1)
        kept = torch.zeros_like(p).scatter(-1, p.topk(self.routed_active).indices, 1.0)
        if self.training:
            self.auxiliary_loss = self.load_balance * _imbalance(p, kept, inputs)
        if not self.learned:
            return torch.cat((shared, kept + (p - p.detach())), dim=-1)
        routed = p * kept / (p * kept).sum(-1, keepdim=True) * self.routed_active
        if not self.shared_heads:
            return routed
        first, second = (2 * self.balance(x).softmax(-1)).split(1, dim=-1)
        return torch.cat((first * shared, second * routed), dim=-1)

    def query_norms(self, x: Tensor) -> Tensor:
        """Lengths of the routed heads' unrotated queries over their deviation among these heads."""
        start, bias = self.shared_heads * self.head_dim, self.q_proj.bias
        q = linear(x, self.q_proj.weight[start:], None if bias is None else bias[start:])
        each = rearrange(q, "b t (h d) -> b t h d", d=self.head_dim)
        norms: Tensor = torch.linalg.vector_norm(each, dim=-1)
        if self.routed_heads == 1:
            return norms
        spread = norms.var(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        return norms / spread.sqrt()

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Gated heads, joined and projected."""
        self.auxiliary_loss = None
        return super().output(
            heads * rearrange(self.head_gates(inputs), "b t h -> b h t 1"), inputs
        )


def _imbalance(p: Tensor, kept: Tensor, inputs: Inputs) -> Tensor:
    """R · Σ mean(p) · mean(kept), over the tokens that are no padding; K when spread evenly."""
    valid = inputs.valid_now if inputs.context is None else None
    each = p.new_ones(p.shape[:2]) if valid is None else valid.to(p.dtype)
    share = (each / each.sum().clamp(min=1))[..., None]
    return p.shape[-1] * ((p * share).sum((0, 1)) * (kept * share).sum((0, 1))).sum()
