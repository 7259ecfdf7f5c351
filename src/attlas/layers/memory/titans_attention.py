"""Titans with attention to what is near, beside or above a memory of all that was.

    gate      y = Attn([p | x])            o = y ⊗ M(x)            a ⊗ b = norm(a) · σ(norm(b))
    layer     y = Attn([p | M(x)])         o = y

p are persistent tokens: trained inputs that every query sees, and that no position rotates. Attention is
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
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.layers.memory.titans import NeuralMemory
from attlas.masks import Mask
from attlas.options import option
from attlas.supports import Supports


class WithMemory(Attention):
    """Causal attention with persistent tokens and a memory."""

    supports = Supports(
        bidirectional=False, cross=False, masks="padding", remembers=True,
        one_length="torch.export cannot take the gradients that the memory itself goes by",
    )  # fmt: skip
    changes = ("aggregate",)  # what is far is recalled by the memory instead
    #: Options of the memory where none are given.
    memory_defaults: ClassVar[Mapping[str, Any]] = {}

    persistent: int = option("how many persistent tokens", default=4, at_least=1)
    memory_options: Mapping[str, Any] = option(
        "options of the memory, besides its sizes", factory=lambda layer: {}, alias="memory"
    )

    def setup(self) -> None:
        """Persistent tokens, the memory, and what ⊗ takes.

        Raises:
            ValueError: a position encoding that adds to scores, or what the memory refuses.
        """
        super().setup()
        if self.score_mod is not None:
            raise UserError("position: a bias on scores tells nothing of persistent tokens")
        self.tokens = nn.Parameter(0.02 * torch.randn(1, self.persistent, self.dim))
        self.memory = NeuralMemory(
            self.dim, self.heads, head_dim=self.head_dim, bias=self.bias,
            **{**self.memory_defaults, **self.memory_options},
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
    """Sliding-window attention with persistent tokens."""

    #: Which keys lie in the window is told by where all of them stand.
    roomy: ClassVar[bool] = False
    beyond = (
        "project: persistent tokens stand before all keys",
        "mask: a query sees the persistent tokens and a window",
    )
    expected_failures: ClassVar[dict[str, str]] = {
        "static-cache": "its layers have no room for the state of the memory"
    }

    window: int = option("tokens that a query sees, itself among them", default=512, at_least=1)

    def restore(self, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Keys and values behind the persistent ones."""
        pairs = zip(self.keys_of(self.tokens), (k, v), strict=True)
        k, v = (torch.cat((own.expand(len(x), -1, -1, -1), x), dim=2) for own, x in pairs)
        return k, v

    def mask(self, q: Tensor, k: Tensor, inputs: Inputs) -> Mask | Tensor:
        """The persistent tokens, and valid ones in the window."""
        near = (masks.causal & masks.window(self.window)) | masks.sinks(self.persistent)
        if (valid := inputs.valid) is None:
            return near
        shown = torch.cat((valid.new_ones(len(valid), self.persistent), valid), dim=1)
        if not inputs.gaps:
            return near & masks.padding(shown)
        of = inputs.key_positions + self.persistent  # padding between tokens is no distance
        first = torch.arange(self.persistent, device=of.device).expand(len(of), -1)
        seen = masks.at(near, of[..., -q.shape[2] :], torch.cat((first, of), dim=-1))
        return seen & shown[:, None, None, :]


def _gate(step: str) -> str:
    """The layer of the claim, with a linear memory."""
    memory = f"{{'chunk': 2, 'depth': 1, 'residual': False, {step}}}"
    return f"titans-memory-as-gate(window=4, memory={memory})"


_EXAMPLE = {"persistent": 2, "memory": {"chunk": 2}}


@mechanism(
    "titans-memory-as-gate", paper="titans-neural-memory", aliases=("titans-mag",),
    example={**_EXAMPLE, "window": 4},
)  # fmt: skip
class MemoryAsGate(_Windowed):
    """What attention finds near, gated by what the memory recalls."""

    #: The rivals: the same layer whose memory learns nothing, which leaves a window, and the default
    #: memory. Ours takes the paper's step, as θ multiplies a mean over the 16 channels of a head.
    claims = (
        Claim(
            "with a window far shorter than the text, it finds needles at eight times the trained length",
            task="extrapolation", split="128 tokens", ours=_gate("'max_step': 16.0"),
            against=(_gate("'max_step': 1e-9"), "titans-memory-as-gate(window=4)"), steps=600, dim=32,
            heads=2, rate=5e-3,
        ),
    )  # fmt: skip

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

    def setup(self) -> None:
        """Nothing is gated here."""
        super().setup()
        del self.own_norm, self.memory_norm

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of M(x)."""
        return super().project(replace(inputs, x=self.memory.beside(inputs)))
