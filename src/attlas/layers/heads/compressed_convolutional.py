"""Compressed convolutional attention (CCA): all of attention inside a narrow, convolved latent.

    q̃ = x W_Q,  k̃ = x W_K  (narrow);   [q̂, k̂] = conv_heads(conv_channels([q̃, k̃]))   causal, in time
    m_h = (q̃_h + k̃_g(h)) / 2;   q_h = q̂_h + m_h,   k_g = k̂_g + mean of m over the group's heads
    q ← √d q / ‖q‖,  k ← τ_g √d k / ‖k‖, then positions;   v_t = [x_t W_V, x_{t−1} W_V']

The first convolution is depthwise, the second mixes the channels of each head. Padding counts as zeros,
as what comes before the first token does; v's halves are joined before they are split into heads.

Cost: with heads · head_dim = dim / C the scores and sums shrink by C, and the cache by
dim / (kv_heads · head_dim); two short convolutions come on top.
Reduces to grouped-query attention with normalised queries and keys where the convolutions undo the means.
Source: "Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space", by ZAYA's
code, whose kernels are 2 and 2. Its τ is made as 0, to be loaded; here τ starts at 1, so that training
starts from a map that is not uniform. C = 2 is that model's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn.functional import pad

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports, share_of_dim


@mechanism("compressed-convolutional", aliases=("cca",))
class CompressedConvolutional(Attention):
    """Attention in a compressed latent; fewer `kv_heads` compress keys and values further (CCGQA)."""

    supports = Supports(cross=False, gaps=False, remembers=True)
    expected_failures: ClassVar[dict[str, str]] = dict.fromkeys(
        ("static-cache", "told-positions"), "convolutions read the inputs before, in order")  # fmt: skip

    head_dim: int = option(
        "width of a head; dim / (heads · compression) unless given", kw_only=False, at_least=1,
        factory=lambda layer: share_of_dim(layer, layer.compression),
    )  # fmt: skip
    compression: int = option(
        "C, how much narrower all heads together are than the inputs, unless head_dim is given",
        default=2, at_least=1,
    )  # fmt: skip
    kernels: tuple[int, int] = option(
        "tokens that the depthwise and the per-head convolution see", default=(2, 2), at_least=1
    )

    def setup(self) -> None:
        """The convolutions, and the keys' temperatures."""
        super().setup()
        groups, (first, second) = self.heads + self.kv_heads, self.kernels
        channels = groups * self.head_dim
        self.conv_channels = nn.Conv1d(channels, channels, first, groups=channels)
        self.conv_heads = nn.Conv1d(channels, channels, second, groups=groups)
        self.temperature = nn.Parameter(torch.ones(self.kv_heads))

    def make_projections(self) -> None:
        """Narrow projections; of the values one half is made of the token before."""
        super().make_projections()
        del self.v_proj
        width = self.kv_heads * self.head_dim
        self.v_current = nn.Linear(self.dim, width - width // 2, bias=self.bias)
        self.v_delayed = nn.Linear(self.dim, width // 2, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved queries and keys with their means, not normalised yet; values of two tokens."""
        x, valid = inputs.x, inputs.valid_now
        narrow = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1)
        if valid is not None:
            x, narrow = (t * valid[..., None].to(t.dtype) for t in (x, narrow))
        latents = self.before(narrow, "latents", sum(self.kernels) - 2, inputs)
        # Fused kernels want a head's channels side by side.
        convolved = self.conv_heads(self.conv_channels(latents.mT)).mT.contiguous()
        width = self.heads * self.head_dim
        q, k = map(self.split_heads, narrow.tensor_split((width,), dim=-1))
        mean = (q + ops.repeated(k, q.shape[1])) / 2
        group_mean = reduce(mean, "b (g h) t d -> b g t d", "mean", g=self.kv_heads)
        q, k = map(self.split_heads, convolved.tensor_split((width,), dim=-1))
        delayed = self.v_delayed(self.before(x, "x", 1, inputs)[:, :-1])
        v = torch.cat((self.v_current(x), delayed), dim=-1)
        return q + mean, k + group_mean, self.split_heads(v)

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Both of length √d, keys times their temperature, then rotated."""
        q, k = (ops.unit(t) * self.head_dim**0.5 for t in (q, k))
        return super().position(q, k * self.temperature[:, None, None], inputs)

    def before(self, now: Tensor, name: str, tokens: int, inputs: Inputs) -> Tensor:
        """[batch, tokens + now, channels]: what came before as well, zeros before the start."""
        seen = inputs.recall(name)
        whole = pad(now, (0, 0, tokens, 0)) if seen is None else torch.cat((seen, now), dim=1)
        inputs.remember(name, whole[:, whole.shape[1] - tokens :])
        return whole
