"""Multi-head latent attention (MLA): one latent a token is cached, and read once for all heads.

    c = RMSNorm(x W_DKV)   k_h = [c W_UK^h | RoPE(x W_KR)]   v_h = c W_UV^h        (W_KR for all heads)
    q_h = [a W_UQ^h | RoPE(a W_QR^h)],  a = x, or RMSNorm(x W_DQ);   scores / √(d_nope + d_rope)

Expanded (prefill, training): keys and values are made of the latents, then multi-head attention.
Absorbed (few queries, many keys): q_h W_UKᵀ meets c itself, Σ weights c is then taken through W_UV:
all heads are rows of two products with the one cached latent.

Cost: latent + rotary numbers cached a token; almost 2 · heads times multi-head attention's FLOP/byte.
Reduces to multi-query attention (absorbed) with keys [c | RoPE] and values c.
Source: "The New LLM Bottleneck: A Systems Perspective on Latent Attention and Mixture-of-Experts", which
analyses the layer of "DeepSeek-V2"; widths unless given, 4 · head_dim and head_dim / 2, are the latter's.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.positions import RoPE
from attlas.supports import Supports


@mechanism("multi-head-latent-attention", paper="mla-arithmetic-intensity", aliases=("mla",))
class MultiHeadLatent(Attention):
    """Attention to latents; `head_dim` is the width of a key without its rotary part."""

    supports = Supports(position=False)
    changes = ("output",)  # heads are as wide as the values

    latent: int = option(
        "width of the latent; 4 · head_dim unless given", at_least=1,
        factory=lambda layer: 4 * layer.head_dim,
    )  # fmt: skip
    rotary: int = option(
        "width of the rotary part of queries and keys; half of head_dim unless given", at_least=1,
        factory=lambda layer: max(2, layer.head_dim // 4 * 2),
    )  # fmt: skip
    query_latent: int | None = option(
        "width of the queries' own latent; None: they come from the inputs", default=None,
        at_least=1,
    )  # fmt: skip
    value_dim: int = option(
        "width of a head's values; head_dim unless given", at_least=1,
        factory=lambda layer: layer.head_dim,
    )  # fmt: skip
    rotary_base: float = option("of the wavelengths", default=10000.0, above=0)

    def setup(self) -> None:
        """The rotation and the scale of what meets it and the latents."""
        super().setup()
        if self.kv_heads != self.heads:
            raise ValueError(
                f"kv_heads must be heads={self.heads}: all share a latent, got {self.kv_heads}"
            )
        self.rope = RoPE(self.rotary, self.rotary_base, interleaved=True)
        self.scale = (self.head_dim + self.rotary) ** -0.5

    def make_projections(self) -> None:
        """Down to latents and up to heads; biases, as published, on the way down and at the output."""
        narrow = self.query_latent or self.dim
        self.q_down = nn.Sequential()
        if self.query_latent is not None:
            self.q_down.append(nn.Linear(self.dim, narrow, bias=self.bias))
            self.q_down.append(nn.RMSNorm(narrow, eps=1e-6))
        self.q_proj = nn.Linear(narrow, self.heads * (self.head_dim + self.rotary), bias=False)
        self.kv_down = nn.Linear(self.dim, self.latent + self.rotary, bias=self.bias)
        self.kv_norm = nn.RMSNorm(self.latent, eps=1e-6)
        up = self.heads * (self.head_dim + self.value_dim)
        self.kv_up = nn.Linear(self.latent, up, bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_dim, self.dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and [latent | rotary key] of one head; there are no values beside the latents."""
        q = rearrange(self.q_proj(self.q_down(inputs.x)), "b t (h d) -> b h t d", h=self.heads)
        latent, key = self.parts(self.kv_down(inputs.tokens))
        k = torch.cat((self.kv_norm(latent), key), dim=-1)[:, None]
        return q, k, k[..., :0]

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The rotary parts rotated; where queries and keys stand alike, in one go."""
        (nope, q), (latent, k) = self.parts(q), self.parts(k)
        if inputs.context is None:
            rotated = self.rope.rotate(torch.cat((q, k), dim=1), inputs.positions)
            q, k = rotated[:, :-1], rotated[:, -1:]
        else:
            q = self.rope.rotate(q, inputs.positions)
            k = self.rope.rotate(k, inputs.token_positions)
        return torch.cat((nope, q), dim=-1), torch.cat((latent, k), dim=-1)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What meets by content, and the rotary part."""
        return x[..., : -self.rotary], x[..., -self.rotary :]

    def restore(self, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The values are the latents, which the keys hold."""
        return k, k[..., : self.latent]

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Absorbed: queries taken through W_UK, so that they meet the latents themselves."""
        return ops.grouped_product(torch.cat(self.absorbed(q), dim=-1) * self.scale, k.mT)

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Absorbed: latents summed, then taken through W_UV."""
        return super().aggregate(weights, v, inputs) @ self.up()[1].mT

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Absorbed where all scores take no more room than the latents, expanded otherwise."""
        if q.shape[2] == k.shape[2] or q.shape[2] * self.heads > k.shape[-1]:
            return self.expanded(q, k, v, inputs)
        summed = ops.latent_attend(
            *self.absorbed(q), k, mask=inputs.pairs, scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return summed @ self.up()[1].mT

    def absorbed(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries taken through W_UK, which meet latents, and their rotary parts."""
        nope, rotated = self.parts(q)
        return nope @ self.up()[0], rotated

    def expanded(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Keys and values of every head made of the latents, then plain attention."""
        up_k, up_v = self.up()
        shared = self.parts(k)[1].expand(-1, self.heads, -1, -1)
        return self.fused(q, torch.cat((v @ up_k.mT, shared), dim=-1), v @ up_v.mT, inputs)

    def up(self) -> tuple[Tensor, Tensor]:
        """W_UK [heads, head_dim, latent] and W_UV [heads, value_dim, latent]."""
        each = rearrange(self.kv_up.weight, "(h d) c -> h d c", h=self.heads)
        return each[:, : self.head_dim], each[:, self.head_dim :]
