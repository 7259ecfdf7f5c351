"""RNoPE-SWA: rotary layers that see a window, and every fourth a layer without positions that sees all.

    layer l:  l + 1 no multiple of 4   softmax(R_i q_i · R_j k_j / √d)   over 0 ≤ i − j < window
              l + 1 a multiple of 4    softmax(q_i · k_j / √d)           over all keys

Rotary layers know order nearby, the layer without positions finds anything at any distance, and no
rotation beyond the window ever has to be learnt. `attention_mass` measures what goes to the
beginning, the needle and the end, which is how the paper came to the split. Its models for comparison
are `softmax` with `position="rope"`, without one, and with `qk_norm` as here.

Cost: windowed layers keep window − 1 tokens in a cache, and scores linear in length.
Reduces to softmax attention without positions in the full layers, and with rotary positions in the
others when the window covers the sequence.
Source: "Rope to Nope and Back Again: A New Hybrid Attention Strategy". Windows of 4096 and three to
one are the paper's and Cohere2's in Transformers, which the layers are checked against; that the
norm is a layer norm with gains for each head, as in Cohere's earlier models, rests on those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from attlas import masks
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.masks import Mask
from attlas.options import option
from attlas.positions import RoPE
from attlas.supports import Supports

if TYPE_CHECKING:
    from attlas.hf.caches import Cache


@mechanism("rope-nope-hybrid", aliases=("rnope-swa",), reduces_to=Reduction(
    "softmax", {"layer_idx": 3}, lambda layer, plain: plain.load_state_dict(layer.state_dict())
), example={"window": 4})  # fmt: skip
class RopeNopeHybrid(Attention):
    """A windowed rotary layer or a full layer without positions, as `layer_idx` says."""

    claims = (
        Claim(
            "windowed rotary layers among layers without positions retrieve beyond the trained length",
            ours="rope-nope-hybrid(window=16, period=2)", task="extrapolation", split="64 tokens",
            steps=600,
        ),
    )  # fmt: skip

    supports = Supports(cross=False, position=False, gaps=False)
    expected_failures: ClassVar[dict[str, str]] = {
        "told-positions": "the window is over tokens in their order"
    }

    #: Its mask is that of its pattern, whatever a sliding cache has let go of.
    roomy: ClassVar[bool] = True
    window: int = option(
        "keys that a rotary layer sees, the query's own included", default=4096, at_least=1
    )
    period: int = option(
        "every so many layers one is full and without positions", default=4, at_least=1
    )
    base: float = option("of the rotary wavelengths", default=10000.0, above=0)
    interleaved: bool = option(
        "rotary pairs are channels (0, 1), (2, 3), … as in Cohere's models", default=False
    )
    qk_norm: bool = option(
        "queries and keys of every head go through a layer norm before they are rotated",
        default=False,
    )

    def setup(self) -> None:
        """Window and rotation of a windowed layer, and the norms."""
        super().setup()
        if self.windowed(self.layer_idx):
            self.pattern = masks.both(self.pattern, masks.window(self.window))
            self.position_encoding = RoPE(self.head_dim, self.base, interleaved=self.interleaved)
        if self.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(self.heads, self.head_dim))
            self.k_norm = nn.Parameter(torch.ones(self.kv_heads, self.head_dim))

    def windowed(self, layer_idx: int) -> bool:
        """Whether the layer at `layer_idx` is a windowed rotary one."""
        return (layer_idx + 1) % self.period != 0

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Normalised where asked for, and rotated in the rotary layers."""
        if self.qk_norm:
            q, k = (
                layer_norm(x, x.shape[-1:]) * gain[:, None].to(x.dtype)
                for x, gain in ((q, self.q_norm), (k, self.k_norm))
            )
        return super().position(q, k, inputs)

    def mask(self, q: Tensor, k: Tensor, inputs: Inputs) -> Mask | Tensor | None:
        """Which pairs may meet; a sliding cache has let go of keys that the window hides anyway."""
        if isinstance(inputs.mask, Tensor) and inputs.mask.ndim == 4:
            inputs = replace(inputs, mask=inputs.mask[..., -k.shape[2] :])
        pairs = super().mask(q, k, inputs)
        gone = inputs.key_positions.shape[-1] - k.shape[2]
        if gone and inputs.valid is None and isinstance(pairs, Mask) and not pairs.relative:
            all_keys = gone + k.shape[2]
            return masks.dense(pairs, q.shape[2], all_keys, device=q.device)[..., gone:]
        return pairs

    def init_cache(self) -> Cache:
        """An empty cache whose windowed layers hold what the window can still see."""
        from attlas.hf.caches import DynamicLayer, DynamicSlidingWindowLayer

        cache = super().init_cache()
        cache.layers = [
            DynamicSlidingWindowLayer(self.window) if self.windowed(at) else DynamicLayer()
            for at in range(self.layer_idx + 1)
        ]
        return cache


def attention_mass(
    weights: Float[Tensor, "batch heads queries keys"], needle: Sequence[int], ends: int = 10
) -> dict[str, Float[Tensor, "batch heads queries"]]:
    """Shares of each query's attention that go to parts of the sequence; they sum to its weights.

    Args:
        weights: as `layer.weights` gives them.
        needle: positions of the needle's tokens.
        ends: tokens that count as the beginning (the sinks) and as the end (the recent ones).

    Returns:
        begin, needle, context and end; a token of the needle counts as nothing else.
    """
    keys = weights.shape[-1]
    at = torch.arange(keys, device=weights.device)
    is_needle = torch.zeros(keys, dtype=torch.bool, device=weights.device)
    is_needle[list(needle)] = True
    begin = (at < ends) & ~is_needle
    end = (at >= keys - ends) & ~is_needle & ~begin
    parts = {"begin": begin, "needle": is_needle, "context": ~(begin | is_needle | end), "end": end}
    return {name: (weights * part).sum(-1) for name, part in parts.items()}
