"""Optimised, efficient and super attention: projections that the next matrix can do are dropped.

    optimised   head_h = softmax(q_h k_hᵀ / √d) x_h          x_h: slice h of the input; no W_V
    efficient   head_h = softmax(q_h x_hᵀ / √d) x_h          no W_K either: W_Q and W_O remain
    super       head_h = softmax(q_h x_hᵀ / √d) W_A x_h      W_A [length, length] mixes tokens

With `causal=True` W_A counts by its lower triangle. It is fixed in size: shorter sequences use its
leading block, longer ones are refused.

Cost: plain attention without one or two projections of dim²; super adds n²·dim for W_A.
Reduces to softmax attention whose missing projections are the identity; super to efficient, W_A = I.
Source: "You Need to Pay Better Attention". Scale, slices and W_A's initialisation rest on a third
party's program, which gives W_A a bias over positions too: here with `bias=True`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option
from attlas.supports import Supports


def _identities(layer: Attention, plain: Attention) -> None:
    """The plain layer's own projections become the identity."""
    taken = plain.load_state_dict(layer.state_dict(), strict=False)
    for name in taken.missing_keys:
        own = plain.get_parameter(name)
        own.copy_(torch.eye(len(own)) if own.ndim == 2 else torch.zeros(len(own)))


@mechanism("optimised-attention", paper="super-attention", reduces_to=Reduction(
    "softmax", {}, _identities
))  # fmt: skip
class Optimised(Attention):
    """Attention over slices of the input as values; three quarters of the parameters."""

    def setup(self) -> None:
        """Refuse heads that are no slices of the input."""
        super().setup()
        if self.kv_heads != self.heads:
            raise ValueError(
                f"kv_heads must be heads={self.heads}: each has its slice of the input"
            )
        if self.head_dim * self.heads != self.dim:
            raise ValueError(
                f"head_dim must be dim / heads = {self.dim / self.heads:g}: a slice of the input"
            )

    def make_projections(self) -> None:
        """Queries, keys and the output."""
        super().make_projections()
        del self.v_proj

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys projected, values as they came."""
        q, k = self.q_proj(inputs.x), self.k_proj(inputs.tokens)
        return self.split_heads(q), self.split_heads(k), self.split_heads(inputs.tokens)


@mechanism("efficient-qk-attention", paper="super-attention", reduces_to=Reduction(
    "softmax", {}, _identities
))  # fmt: skip
class EfficientQK(Optimised):
    """Attention over slices of the input as keys and values; half of the parameters."""

    claims = (
        Claim(
            "without key and value projections nothing is lost", task="shakespeare-bytes",
            better="lower", margin=0.02, steps=500, batch=16,
        ),
    )  # fmt: skip

    def make_projections(self) -> None:
        """Queries and the output."""
        super().make_projections()
        del self.k_proj

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries projected, keys and values as they came."""
        slices = self.split_heads(inputs.tokens)
        return self.split_heads(self.q_proj(inputs.x)), slices, slices


def _no_mixing(layer: Super, plain: Attention) -> None:
    layer.kernel.weight.copy_(torch.eye(layer.length))
    _ = plain.load_state_dict(layer.state_dict(), strict=False)


@mechanism("super-attention", reduces_to=Reduction("efficient-qk-attention", {}, _no_mixing))
class Super(EfficientQK):
    """Efficient attention whose values are mixed along the sequence by one learned kernel."""

    supports = Supports(memory="quadratic", counts=True, remembers=True)
    #: Keys are the inputs, and W_A mixes the values; `project` does both.
    changes = ("score", "aggregate")
    expected_failures: ClassVar[dict[str, str]] = {
        "static-cache": "new values mix in all earlier inputs, for which a StaticCache has no room"
    }

    length: int = option(
        "tokens at most, cached ones and padding included", default=512, at_least=1
    )

    def setup(self) -> None:
        """The kernel W_A."""
        super().setup()
        self.kernel = nn.Linear(self.length, self.length, bias=self.bias)
        nn.init.xavier_uniform_(self.kernel.weight)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """As the efficient form's, the values mixed."""
        q, k, _ = super().project(inputs)
        return q, k, self.split_heads(self.mixed(inputs))

    def mixed(self, inputs: Inputs) -> Tensor:
        """W_A's rows for the new tokens times all tokens, those of earlier passes recalled."""
        earlier, tokens, at = inputs.recall("tokens"), inputs.tokens, inputs.key_positions
        total, new = at.shape[-1], tokens.shape[1]
        if total > self.length:
            raise ValueError(f"length={self.length} is the longest sequence, got {total} tokens")
        every = tokens if earlier is None else torch.cat((earlier, tokens), dim=1)
        inputs.remember("tokens", every)
        kernel = self.kernel.weight.tril() if self.causal else self.kernel.weight
        bias, now = self.kernel.bias, at[..., total - new :]
        kernel = kernel[now[..., :, None], at[..., None, :]]
        if inputs.valid is not None:
            kernel = kernel * inputs.valid[:, None].to(kernel.dtype)
        mixed = kernel @ every
        return mixed if bias is None else mixed + bias[now][..., None]
