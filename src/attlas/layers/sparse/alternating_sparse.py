"""Alternating sparse attention (ASA): layers take turns to look near and far, and cache latents.

    local    y = W_O MLA(x) within the last w tokens                              layers 0, 2, 4, …
             c = RMSNorm(x W_DKV)                                   one latent for all heads
             k^h = [c W_UK^h | RoPE(x W_KR)],   v^h = c W_UV^h
    global   y = W_O (g¹ ⊙ compression + g² ⊙ selection)                          layers 1, 3, 5, …
             c^g = RMSNorm(x W_DKV^g)                               one latent for each group of heads
             k^g = [c^g W_UK^g | RoPE(x W_KR)],   v^g = c^g W_UV^g
    q^h = [x W_UQ^h | RoPE(x W_QR^h)],   scores / √(d + r)

Compression and selection are those of native sparse attention, over the keys k^g and values v^g. W_KR
serves all heads. A layer caches its latents and the rotary key: kv_heads · d numbers a token as widths
are unless given, where native sparse attention caches 2 · kv_heads · d.

Cost: n·w pairs in a local layer; n²/stride products and n·topk·selected pairs in a global one, and
2·n·latent·d multiply-adds for each head of keys to make these and the values of the latents.
Reduces to multi-head latent attention where local and w ≥ n.
Source: "Optimizing Native Sparse Attention with Latent Attention and Local Global Alternating
Strategies", of which no program is known. Widths of latents, and that one rotary key serves all groups,
are as in latent attention elsewhere; which kind of layer comes first is our choice.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.bases.chosen import dense_of
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.layers.sparse.native_sparse import NativeSparse
from attlas.options import option
from attlas.positions import RoPE
from attlas.supports import Supports


def _rotary(layer: AlternatingSparse) -> int:
    """About half of a head; even, and shared alike by the groups, so that a cache holds half."""
    unit = math.lcm(2, layer.kv_heads)
    return max(1, round(layer.head_dim / 2 / unit)) * unit


def _latent(layer: AlternatingSparse) -> int:
    """What makes latents and rotary key kv_heads · head_dim wide."""
    room = layer.kv_heads * layer.head_dim - layer.rotary
    return max(1, room if layer.scope == "local" else room // layer.kv_heads)


@mechanism(
    "alternating-sparse-attention", aliases=("asa",),
    example={
        "scope": "global", "block": 4, "stride": 2, "selected": 2, "topk": 4, "window": 3, "hidden": 4,
    },
    reduces_to=Reduction(
        "multi-head-latent-attention",
        {"scope": "local", "window": 10**6, "latent": 32, "rotary": 4},
    ),
)  # fmt: skip
class AlternatingSparse(NativeSparse):
    """Causal attention to a window or to compressed and chosen blocks, by turns, over latents."""

    supports: ClassVar[Supports] = replace(NativeSparse.supports, position=False)
    beyond: ClassVar[tuple[str, ...]] = (
        "position: latents have a rotary key beside them", *NativeSparse.beyond,
    )  # fmt: skip

    block: int = option("tokens of a compressed block", default=16, at_least=1)
    selected: int = option("tokens of a selected block", default=16, at_least=1)
    scope: Literal["local", "global"] = option(
        "what the layer looks at; local in even layers, global in odd ones, unless given",
        factory=lambda layer: "global" if layer.layer_idx % 2 else "local",
    )  # fmt: skip
    rotary: int = option(
        "r, width of the rotary part of queries and keys; about half of head_dim unless given",
        at_least=1, factory=_rotary,
    )  # fmt: skip
    latent: int = option(
        "width of a latent; what leaves kv_heads · head_dim numbers a token unless given", at_least=1,
        factory=_latent,
    )  # fmt: skip
    rotary_base: float = option("of the wavelengths", default=10000.0, above=0)

    def setup(self) -> None:
        """The rotation, and the scale of what meets it and the latents.

        Raises:
            ValueError: a local layer without a window, or what native sparse attention refuses.
        """
        super().setup()
        if self.window is None:
            raise UserError("window must be a number of tokens, got None: local layers see nothing else")
        self.rope = RoPE(self.rotary, self.rotary_base, interleaved=True)
        self.scale = (self.head_dim + self.rotary) ** -0.5

    def make_projections(self) -> None:
        """Down to latents and up to heads; gates and compressions in a global layer."""
        self.latents = 1 if self.scope == "local" else self.kv_heads
        self.made_heads = self.heads if self.scope == "local" else self.kv_heads
        self.q_proj = nn.Linear(self.dim, self.heads * (self.head_dim + self.rotary), bias=False)
        self.kv_down = nn.Linear(self.dim, self.latents * self.latent + self.rotary, bias=self.bias)
        self.kv_norm = nn.RMSNorm(self.latent, eps=1e-6)
        self.kv_up = nn.Linear(self.latent, self.made_heads * 2 * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, self.dim, bias=self.bias)
        if self.scope == "global":
            self.make_branches(2, self.head_dim + self.rotary, self.head_dim)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and [latents | rotary key] of one head; there are no values beside the latents."""
        if self.scope == "global":
            inputs.notes["gates"] = self.gates(inputs.x)
        q = rearrange(self.q_proj(inputs.x), "b t (h d) -> b h t d", h=self.heads)
        latents, key = self.parts(self.kv_down(inputs.tokens))
        latents = self.kv_norm(latents.unflatten(-1, (self.latents, -1))).flatten(-2)
        k = torch.cat((latents, key), dim=-1)[:, None]
        return q, k, k[..., :0]

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What meets by content, and the rotary part."""
        return x[..., : -self.rotary], x[..., -self.rotary :]

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The rotary parts rotated, in one go."""
        (nope, q), (latents, k) = self.parts(q), self.parts(k)
        rotated = self.rope.rotate(torch.cat((q, k), dim=1), inputs.positions)
        q, k = rotated[:, :-1], rotated[:, -1:]
        return torch.cat((nope, q), dim=-1), torch.cat((latents, k), dim=-1)

    def restore(self, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The values are the latents, which the keys hold."""
        return k, k[..., : -self.rotary]

    def keys_of(
        self, k: Float[Tensor, "batch _ keys kept"]
    ) -> Float[Tensor, "batch made keys key"]:
        """Keys made of latents, each with the rotary one."""
        latents, rotary = self.parts(k)
        made = self.each(latents) @ self.up()[0].mT
        return torch.cat((made, rotary.expand(-1, self.made_heads, -1, -1)), dim=-1)

    def values_of(
        self, v: Float[Tensor, "batch _ keys latents"]
    ) -> Float[Tensor, "batch made keys head_dim"]:
        """Values made of latents."""
        return self.each(v) @ self.up()[1].mT

    def each(
        self, latents: Float[Tensor, "batch _ keys joined"]
    ) -> Float[Tensor, "batch latents keys latent"]:
        """Latents of one head of tokens; or of a head for each group, which takes its own."""
        if latents.shape[1] == 1:
            return rearrange(latents, "b 1 t (g c) -> b g t c", g=self.latents)
        own = latents.unflatten(-1, (self.latents, -1)).diagonal(dim1=1, dim2=3)
        found: Tensor = rearrange(own, "b t c g -> b g t c")
        return found

    def up(self) -> tuple[Tensor, Tensor]:
        """W_UK and W_UV, [heads, head_dim, latent] each."""
        both = rearrange(self.kv_up.weight, "(h d) c -> h d c", h=self.made_heads)
        return both[:, : self.head_dim], both[:, self.head_dim :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The window, or the gated sum of compression and selection."""
        return super().attend(q, k, v, inputs) if self.scope == "global" else self.near(q, k, v, inputs)

    def near(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Attention to the window; a lone query goes through W_UK and meets the latents themselves."""
        if q.shape[2] > 1:
            return super().near(q, k, v, inputs)
        k = self.last(k, 1, inputs)
        (nope, rotated), (up_k, up_v) = self.parts(q), self.up()
        summed = ops.latent_attend(
            nope @ up_k, rotated, k, mask=self.near_mask(q, k, inputs), scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return summed @ up_v.mT

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Weights of the window, or those of native sparse attention."""
        if self.scope == "global":
            return super().weigh(q, k, inputs)
        scores = ops.grouped_product(q * self.scale, self.keys_of(k).mT)
        return ops.softmax(scores.masked_fill(~dense_of(self.near_mask(q, k, inputs), q, k), -torch.inf))

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Values made of latents, summed."""
        if self.scope == "global":
            return super().aggregate(weights, v, inputs)
        return Attention.aggregate(self, weights, self.values_of(v), inputs)
