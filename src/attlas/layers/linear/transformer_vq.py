"""Transformer-VQ: keys are codewords, so that all older ones with the same word count as one.

    k̂_j   = c_z, z_j = argmin_s |k_j − c_s|²        gradients pass on to a k_j that is recent, not to c
    s_ij  = (q_i + u)·k̂_j + [i − j ≤ M] (q_i + w)·r_{i−j}    r = R (sines and cosines of the distance)
    recent keys stand for themselves, older ones by code:  s_is = (q_i + u)·c_s + log n_s, value m_s
    y     = W_o (weights v ⊙ g)       v = SiLU(x W_v)      g = SiLU(x W_g)

n_s counts the older tokens of code s and m_s is the mean of their values: the same numbers as a softmax
over all quantised keys, with a state that does not grow. Queries, keys, r, u and w carry d^(−1/4), and
the RMS of a query or key is 1 before that. A codebook is a running mean of the keys it stands for:

    sums ← γ sums + (1 − γ) Σ_{z_j = s} k_j      counts ← γ counts + (1 − γ) Σ_{z_j = s} 1
    c    = sums / max(counts, 0.01)              loss += β Σ_heads |k − k̂|², averaged over tokens

Cost: n·(M + L + codes)·(d + values) multiply-adds a head in blocks of L tokens; memory linear in n.
Reduces to softmax attention over the quantised keys, whatever L; to no registered mechanism.
Source: "Transformer-VQ: Linear-Time Transformers via Vector Quantization" and its authors' program. The
RMSNorm of x and the dropout of r and of y are the model's there and here; `dropout` drops weights, those
of an older code as one. Codebooks learn once a training pass from the tokens of this process.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn.functional import silu

from attlas import ops
from attlas.attention import Attention
from attlas.bases.packing import heads_at_places, place_heads, ranks
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.network import moving
from attlas.options import option
from attlas.supports import Supports


@mechanism("transformer-vq", example={"codes": 5, "block": 4, "memory": 3})
class TransformerVQ(Attention):
    """Causal gated attention to quantised keys, in linear time."""

    supports = Supports(
        bidirectional=False, cross=False, position=False, masks="padding", cache="state", counts=True,
        one_length="blocks are as long as the sequence where that is shorter, and cut by its length",
    )  # fmt: skip
    changes = ("position", "aggregate")  # distances within the score; older values summed by code
    beyond = ("output: heads are gated, as in the layer that the authors start from",)
    expected_failures: ClassVar[dict[str, str]] = {
        "finite-differences": "a key's gradient is its codeword's, which stays where it is"
    }

    heads: int = option("query heads", default=1, at_least=1, kw_only=False)
    value_dim: int = option(
        "width of a head's values; 2 dim / heads unless given", at_least=1,
        factory=lambda layer: max(1, 2 * layer.dim // layer.heads),
    )  # fmt: skip
    codes: int = option("codewords of a key head", default=512, at_least=1)
    block: int = option("L, tokens that are computed together", default=512, at_least=1)
    memory: int = option(
        "M, the greatest distance that has a bias, and the older keys that a block sees singly",
        default=512, at_least=1,
    )  # fmt: skip
    older: bool = option("whether tokens further away than M count", default=True)
    wavelength: float = option(
        "λ, that of the sinusoids grows from 2π to 2π λ", default=1e5, above=0
    )
    gamma: float = option(
        "γ, how much of a codebook stays in one training pass", default=0.99, at_least=0, below=1
    )
    commitment: float = option(
        "β, weight of the distance between keys and their codewords in the loss", default=1e-4,
        at_least=0,
    )  # fmt: skip

    def setup(self) -> None:
        """The biases u and w, and the codebooks."""
        super().setup()
        self.scale = 1.0  # queries and keys carry it
        self.content_bias = nn.Parameter(torch.zeros(self.heads, 1, self.head_dim))
        self.distance_bias = nn.Parameter(torch.zeros(self.heads, 1, self.head_dim))
        self.code_sums: Tensor
        self.code_counts: Tensor
        sums = torch.randn(self.kv_heads, self.codes, self.head_dim)
        self.register_buffer("code_sums", sums * (self.kv_heads * self.codes) ** -0.5)
        self.register_buffer("code_counts", torch.ones(self.kv_heads, self.codes))

    def make_projections(self) -> None:
        """Projections of queries, keys, values, gates, distances and outputs."""

        def linear(inside: int, outside: int, bias: bool) -> nn.Linear:
            made = nn.Linear(inside, outside, bias=bias)
            nn.init.normal_(made.weight, std=inside**-0.5)
            if bias:
                nn.init.zeros_(made.bias)
            return made

        wide = self.heads * self.value_dim
        self.q_proj = linear(self.dim, self.heads * self.head_dim, self.bias)
        self.k_proj = linear(self.dim, self.kv_heads * self.head_dim, self.bias)
        self.v_proj = linear(self.dim, self.kv_heads * self.value_dim, self.bias)
        self.g_proj = linear(self.dim, wide, self.bias)
        self.r_proj = linear(self.dim, self.kv_heads * self.head_dim, False)
        self.o_proj = linear(wide, self.dim, self.bias)

    @property
    def codebook(self) -> Float[Tensor, "kv_heads codes head_dim"]:
        """The codewords."""
        return self.code_sums / self.code_counts.clamp(min=0.01)[..., None]

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of RMS d^(−1/4), keys not yet quantised, and values."""
        x = inputs.x
        q, k = self.split_heads(self.q_proj(x)), self.split_heads(self.k_proj(x))
        v = rearrange(silu(self.v_proj(x)), "b t (h d) -> b h t d", d=self.value_dim)
        return self._normed(q), self._normed(k), v

    def _normed(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        normed: Tensor = wide * size * self.head_dim**-0.25
        return normed.to(x.dtype)

    @ops.exact
    def nearest(
        self, k: Float[Tensor, "batch kv_heads keys head_dim"]
    ) -> Integer[Tensor, "batch kv_heads keys"]:
        """Codes of keys."""
        c = self.codebook.to(torch.promote_types(k.dtype, torch.float32))
        return (c.square().sum(-1)[:, None] - 2 * k.detach().to(c.dtype) @ c.mT).argmin(-1)

    def marked(self, codes: Tensor) -> Bool[Tensor, "batch kv_heads keys codes"]:
        """Codes as rows with a 1; none where a code is −1."""
        return codes[..., None] == torch.arange(self.codes, device=codes.device)

    def quantised(self, k: Tensor, codes: Tensor) -> Tensor:
        """Codewords in the keys' place, through which gradients reach the keys."""
        words = self.codebook.to(k.dtype).expand(len(k), -1, -1, -1)
        return words.take_along_dim(codes[..., None], dim=2) + (k - k.detach())

    def distances(self, q: Tensor) -> Float[Tensor, "batch heads queries distances"]:
        """(q + w)·r for every distance from 0 to M."""
        steps = torch.arange(0, self.dim, 2, device=q.device) / self.dim
        angle = torch.arange(self.memory + 1, device=q.device)[:, None] / self.wavelength**steps
        sinusoid = torch.cat((angle.sin(), angle.cos()), dim=-1)[:, : self.dim]
        r = rearrange(self.r_proj(sinusoid.to(q.dtype)), "t (h d) -> 1 h d t", d=self.head_dim)
        scale = self.head_dim**-0.25
        q, r = q + self.distance_bias * scale, (r * scale).expand(len(q), -1, -1, -1)
        return ops.grouped_product(q, r)

    def learn(self, k: Tensor, codes: Tensor, inputs: Inputs) -> None:
        """Move the codebooks towards these keys, and ask keys to keep near them."""
        words = self.codebook.to(k.dtype).expand(len(k), -1, -1, -1)
        apart = (k - words.take_along_dim(codes[..., None], dim=2)).square().sum((1, 3))
        valid = inputs.valid_now
        valid = torch.ones_like(apart, dtype=torch.bool) if valid is None else valid
        away = apart.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)
        self.auxiliary_loss = self.commitment * away
        with torch.no_grad():
            dtype = self.code_sums.dtype
            which = self.marked(codes).to(dtype) * valid[:, None, :, None]
            shown = k.to(dtype).masked_fill(~valid[:, None, :, None], 0.0)
            sums = ops.product(which.mT, shown).sum(0)
            self.code_sums.lerp_(sums, 1 - self.gamma)
            self.code_counts.lerp_(which.sum((0, 2)), 1 - self.gamma)

    def score(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Of all quantised keys, none of them by code, with the bias of each distance.

        Raises:
            ValueError: a cache, whose older tokens are known by their codes alone.
        """
        inputs.refuse_weights(inputs.recall("codes") is not None)
        valid, tokens = inputs.valid_now, q.shape[2]
        at = torch.arange(tokens, device=q.device)[None] if valid is None else ranks(valid)
        apart = (at[:, :, None] - at[:, None, :])[:, None]
        biases, k = _biased(self.distances(q), apart), self.quantised(k, self.nearest(k))
        scores = ops.grouped_product(q + self.content_bias * self.head_dim**-0.25, k.mT) + biases
        return scores if self.older else scores.masked_fill(apart > self.memory, -torch.inf)

    @moving
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        """Block by block, from where the cache has left it."""
        codes, tokens, valid = self.nearest(k), k.shape[2], inputs.valid_now
        k_hat, biases = self.quantised(k, codes), self.distances(q)
        which = self.marked(codes).to(v.dtype)
        self.auxiliary_loss = None
        if self.training:
            self.learn(k, codes, inputs)
        size = min(self.block, tokens)
        slots = -(-tokens // size) * size
        if valid is None:
            valid = torch.ones(len(k), tokens, dtype=torch.bool, device=k.device)
        at = ranks(valid)  # with which padding is left out
        q = q + self.content_bias * self.head_dim**-0.25
        q, biases, k_hat, v, which = (
            place_heads(x, at, slots) for x in (q, biases, k_hat, v, which)
        )  # fmt: skip
        before = self._recalled(inputs, v)
        k_hat = torch.cat((before[0] @ self.codebook.to(k.dtype), k_hat), dim=2)
        which, v = torch.cat((before[0], which), dim=2), torch.cat((before[1], v), dim=2)
        self._remember(inputs, which, v, before, valid.sum(-1), slots)
        out = self._blocks(q, biases, k_hat, v, which, before, size)
        return heads_at_places(out, at)

    def _blocks(
        self, q: Tensor, biases: Tensor, k: Tensor, v: Tensor, which: Tensor,
        before: tuple[Tensor, ...], size: int,
    ) -> Tensor:  # fmt: skip
        """Attention of all blocks at once, each to M keys before it, its own, and older codes."""
        groups, seen, slots = self.heads // self.kv_heads, self.memory + size, q.shape[2]
        q, biases = (
            rearrange(x, "b (h g) (n i) d -> b h n (g i) d", g=groups, i=size) for x in (q, biases)
        )
        k, values, own = (x.unfold(2, seen, size).mT for x in (k, v, which))
        i = torch.arange(size, device=q.device).repeat(groups)[:, None]
        apart = i + self.memory - torch.arange(seen, device=q.device)
        near = q @ k.mT + _biased(biases, apart)
        visible = (apart >= 0) & (own.sum(-1) > 0)[..., None, :]
        visible = visible if self.older else visible & (apart <= self.memory)
        scores, counts, sums = near.masked_fill(~visible, -torch.inf), before[2], before[3]
        written = which[:, :, :slots].unflatten(2, (-1, size)).to(sums.dtype)
        added = ops.product(written.mT, v[:, :, :slots].unflatten(2, (-1, size)).to(sums.dtype))
        fresh = written.sum(-2)
        counts = counts[:, :, None] + fresh.cumsum(2) - fresh
        sums = sums[:, :, None] + added.cumsum(2) - added
        if self.older:
            words = self.codebook.to(q.dtype)[:, None]
            far = q @ words.mT + counts.log()[..., None, :].to(q.dtype)
            scores = torch.cat((scores, far), dim=-1)
        weights = torch.dropout(ops.softmax(scores), self.dropout, self.training)
        out = weights[..., :seen] @ values
        if self.older:
            means = (sums / counts.clamp(min=1.0)[..., None]).to(q.dtype)
            out = out + weights[..., seen:] @ means
        return rearrange(out, "b h n (g i) d -> b (h g) (n i) d", g=groups)

    def _recalled(self, inputs: Inputs, v: Tensor) -> tuple[Tensor, ...]:
        """Codes (as rows with a 1) and values of the last M tokens; counts and sums of those before."""
        rows, wide = v.shape[:2], torch.promote_types(v.dtype, torch.float32)
        codes = inputs.recall("codes")
        if codes is None:
            which = v.new_zeros(*rows, self.memory, self.codes)
            values = v.new_zeros(*rows, self.memory, self.value_dim)
            counts = torch.zeros(*rows, self.codes, dtype=wide, device=v.device)
            return which, values, counts, counts[..., None].expand(*counts.shape, self.value_dim)
        which = self.marked(codes).to(v.dtype)
        rest = (inputs.recall(name) for name in ("values", "counts", "sums"))
        return which, *(x for x in rest if x is not None)

    def _remember(
        self, inputs: Inputs, which: Tensor, v: Tensor, before: tuple[Tensor, ...], new: Tensor,
        slots: int,
    ) -> None:  # fmt: skip
        """The last M valid tokens of every row, and by code all that stand before them."""
        if inputs.cache is None:
            return
        left = torch.arange(slots, device=v.device) < new[:, None]
        gone = (which[:, :, :slots] * left[:, None, :, None]).to(before[2].dtype)
        inputs.remember("counts", before[2] + gone.sum(2))
        inputs.remember("sums", before[3] + ops.product(gone.mT, v[:, :, :slots].to(gone.dtype)))
        last = (new[:, None] + torch.arange(self.memory, device=v.device))[:, None, :, None]
        which = which.take_along_dim(last, dim=2)
        inputs.remember("codes", which.argmax(-1).masked_fill(which.sum(-1) == 0, -1))
        inputs.remember("values", v.take_along_dim(last, dim=2))

    def output(
        self, heads: Float[Tensor, "batch heads queries value_dim"], inputs: Inputs
    ) -> Float[Tensor, "batch queries dim"]:
        """Heads joined, gated and projected."""
        joined = rearrange(heads, "b h t d -> b t (h d)")
        y: Tensor = self.o_proj(joined * silu(self.g_proj(inputs.x)))
        return y


def _biased(biases: Tensor, apart: Tensor) -> Tensor:
    """The bias of each pair's distance; none where the key is further away than there are, or later."""
    longest = biases.shape[-1] - 1
    index = apart.clamp(0, longest).expand(*biases.shape[:-1], -1)
    return biases.gather(-1, index).masked_fill((apart < 0) | (apart > longest), 0.0)
