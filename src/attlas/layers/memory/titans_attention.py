"""Titans with attention to what is near, beside or above a memory of all that was.

    gate      y = Attn([p | x])            o = y ⊗ M(x)            a ⊗ b = norm(a) · σ(norm(b))
    layer     y = Attn([p | M(x)])         o = y

p are persistent tokens: trained inputs that every query sees, and that no position turns. Attention is
causal, in a sliding window. The norms have trained gains.

Cost: the memory's, and 2·n·(persistent + window)·dim multiply-adds of attention; memory linear in n.
Reduces to attention in a window where there are neither p nor M; to no registered mechanism.
Source: "Titans: Learning to Memorize at Test Time", from its equations; its authors published no program.
Which of the two norms in ⊗ is followed by σ is not known to us. The paper's memory reads p first, where
ours begins from weights that are trained, and may hold what p would write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas import masks
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.layers.memory.titans import NeuralMemory
from attlas.masks import Mask


class WithMemory(Attention):
    """Causal attention with persistent tokens and a memory.

    Args:
        persistent: how many persistent tokens.
        memory: options of the memory, besides its sizes.

    Raises:
        ValueError: sizes below 1, a position encoding that adds to scores, or what the memory refuses.
    """

    has_two_sided_form = False
    has_cross_form = False
    takes_masks = "padding"

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, persistent: int = 4,
        memory: Mapping[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.persistent, self.options = at_least_one("persistent", persistent), dict(memory or {})
        super().__init__(dim, heads, *args, **options)
        if self.score_mod is not None:
            raise ValueError("position: a bias on scores tells nothing of persistent tokens")

    def make_projections(self) -> None:
        """Projections, persistent tokens, the memory, and what ⊗ takes."""
        super().make_projections()
        self.tokens = nn.Parameter(0.02 * torch.randn(1, self.persistent, self.dim))
        self.memory = NeuralMemory(
            self.dim, self.heads, head_dim=self.head_dim, bias=self.bias, **self.options
        )  # fmt: skip
        eps = torch.finfo(torch.float32).eps
        self.own_norm = nn.RMSNorm(self.dim, eps=eps)
        self.memory_norm = nn.RMSNorm(self.dim, eps=eps)

    def gated(self, y: Tensor, remembered: Tensor) -> Tensor:
        """y ⊗ what the memory says."""
        gate: Tensor = self.memory_norm(remembered).sigmoid()
        own: Tensor = self.own_norm(y)
        return gate * own

    def keys_of(
        self, x: Float[Tensor, "batch tokens dim"]
    ) -> tuple[Float[Tensor, "batch heads tokens d"], Float[Tensor, "batch heads tokens d"]]:
        """Keys and values of tokens that stand nowhere."""
        return self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x))


class _Windowed(WithMemory):
    """Sliding-window attention with persistent tokens.

    Args:
        window: tokens that a query sees, itself among them.
    """

    expected_failures: ClassVar[dict[str, str]] = {
        "static-cache": "its layers have no room for the state of the memory"
    }

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, window: int = 512, **options: Any
    ) -> None:
        self.window = at_least_one("window", window)
        super().__init__(dim, heads, *args, **options)
        near = masks.causal & masks.window(window)
        self.near = near | masks.sinks(self.persistent)  # of keys behind the persistent ones

    def before(self, x: Tensor, persistent: Tensor) -> Tensor:
        """Keys or values behind the persistent ones."""
        return torch.cat((persistent.expand(len(x), -1, -1, -1), x), dim=2)

    def visible(self, k: Tensor, inputs: Inputs) -> Mask:
        """Which keys, persistent ones included, a query sees."""
        if inputs.valid is None:
            return self.near
        valid = inputs.valid[:, -k.shape[2] :]
        always = valid.new_ones(len(valid), self.persistent)
        return self.near & masks.padding(torch.cat((always, valid), dim=1))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries width"]:
        """One fused call."""
        own = self.keys_of(self.tokens)
        return self.fused(
            q, self.before(k, own[0]), self.before(v, own[1]), self.visible(k, inputs)
        )  # fmt: skip

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries persistent_and_keys"]:
        """Weights of persistent tokens, and of all pairs."""
        k, visible = self.before(k, self.keys_of(self.tokens)[0]), self.visible(k, inputs)
        return super().weigh(q, k, visible, inputs)

    def aggregate(
        self,
        weights: Float[Tensor, "batch heads queries persistent_and_keys"],
        v: Float[Tensor, "batch kv_heads keys width"],
    ) -> Float[Tensor, "batch heads queries width"]:
        """Sums over persistent tokens and keys."""
        return super().aggregate(weights, self.before(v, self.keys_of(self.tokens)[1]))


_EXAMPLE = {"persistent": 2, "memory": {"chunk": 2}}


@mechanism(
    "titans-memory-as-gate", paper="titans-neural-memory", aliases=("titans-mag",),
    example={**_EXAMPLE, "window": 4},
)  # fmt: skip
class MemoryAsGate(_Windowed):
    """What attention finds near, gated by what the memory recalls."""

    def output(
        self, heads: Float[Tensor, "batch heads queries width"], inputs: Inputs
    ) -> Float[Tensor, "batch queries dim"]:
        """Heads joined and projected ⊗ M(x)."""
        return self.gated(super().output(heads, inputs), self.memory.beside(inputs))


@mechanism(
    "titans-memory-as-layer", paper="titans-neural-memory", aliases=("titans-mal",),
    example={**_EXAMPLE, "window": 4},
)  # fmt: skip
class MemoryAsLayer(_Windowed):
    """Attention to what the memory makes of each token."""

    def make_projections(self) -> None:
        """Nothing is gated here."""
        super().make_projections()
        del self.own_norm, self.memory_norm

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of M(x)."""
        return super().project(replace(inputs, x=self.memory.beside(inputs)))
