"""Multi-token attention (MTA): a weight depends on neighbouring queries, keys and heads too.

    ŝ_ij    = Σ_{a<c_q, b<c_k} K_ab s_{i−a, j+b−⌊c_k/2⌋}       s = q kᵀ / √d, 0 at hidden pairs
    weights = Σ_h M_hg softmax(ŝ_h)                            heads mixed in groups of c_h
    y       = W_O concat_h (1 − λ) · RMSNorm(weights_h v_h),   λ = 0.8 − 0.6 exp(−0.3 depth)

The kernels start as the identity. Scores may be mixed over all heads before the softmax, the weights
convolved after it as well (then 0 at hidden pairs again), and the heads gated at the end.

Cost: c_q · c_k multiply-adds for each score and c_h for each weight; memory quadratic in length. A
cache holds the last c_q − 1 rows of scores besides keys and values.
Reduces to softmax attention with identity kernels and no norm.
Source: "Multi-Token Attention", with its program's factor for the depth. The large models of the
program also set `mix_scores`, `after_kernel=(6, 11)` and `gate="scalar"`, but not `rescale`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option
from attlas.supports import Supports


@mechanism("multi-token-attention", aliases=("mta",), reduces_to=Reduction(
    "softmax", {"norm": False}, lambda m, plain: plain.load_state_dict(m.state_dict(), strict=False)
))  # fmt: skip
class MultiToken(Attention):
    """Attention whose scores are convolved over queries and keys, and whose weights mix heads."""

    claims = (
        Claim(
            "finds what only several tokens together identify",
            ours="multi-token-attention(kernel=[2,7], norm=False, head_kernel=1)",
            task="blocks(blocks=5, size=4, letters=12)", steps=800, layers=1,
        ),
    )  # fmt: skip

    supports = Supports(memory="quadratic", gaps=False, remembers=True, queries="earlier")
    changes = ("score",)
    expected_failures: ClassVar[dict[str, str]] = {
        "static-cache": "no room for rows of scores",
        "told-positions": "the convolutions are over pairs of tokens in their order",
    }

    kernel_size: Sequence[int] = option(
        "(c_q, c_k), queries and keys that a score depends on", default=(6, 11), at_least=1,
        alias="kernel",
    )  # fmt: skip
    after_kernel_size: Sequence[int] | None = option(
        "the same for the convolution of the weights, None for none", default=None, at_least=1,
        alias="after_kernel",
    )  # fmt: skip
    key_padding: Literal["both", "left", "right"] = option(
        "where a score's neighbours lie: both sides (c_k is then odd), before or after it",
        default="both",
    )
    mix_scores: bool = option("whether all heads' scores are mixed", default=False)
    head_kernel: int = option(
        "heads whose weights are mixed, a divisor of heads; all unless given", at_least=1,
        factory=lambda layer: layer.heads,
    )  # fmt: skip
    normed: bool = option("whether each head has an RMS norm", default=True, alias="norm")
    rescale: bool = option("whether the norm has its factor 1 − λ", default=True)
    gates: Literal["scalar", "channels"] | None = option(
        "a gate on each head's output: one number, or one for each channel", default=None,
        alias="gate",
    )  # fmt: skip
    depth: int = option(
        "layers below this one; layer_idx unless given", at_least=0,
        factory=lambda layer: layer.layer_idx,
    )  # fmt: skip

    def setup(self) -> None:
        """Kernels that begin as the identity, the heads' norm and their gate."""
        super().setup()
        if self.heads % self.head_kernel:
            raise UserError(f"head_kernel must divide heads={self.heads}, got {self.head_kernel}")
        after, groups = self.after_kernel_size, self.heads // self.head_kernel
        self.kernel = self._identity("kernel", self.kernel_size)
        self.after_kernel = self._identity("after_kernel", after) if after else None
        self.score_mix = nn.Parameter(torch.eye(self.heads)) if self.mix_scores else None
        self.head_mix = nn.Parameter(torch.eye(self.head_kernel).repeat(groups, 1, 1))
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5) if self.normed else None
        scaled = self.normed and self.rescale
        self.factor = 0.2 + 0.6 * math.exp(-0.3 * self.depth) if scaled else 1.0
        width = 1 if self.gates == "scalar" else self.head_dim
        self.gate = nn.Linear(self.head_dim, width) if self.gates else None

    def _identity(self, name: str, size: Sequence[int]) -> nn.Parameter:
        if len(size) != 2 or (size[1] % 2 == 0 and self.key_padding == "both"):
            raise UserError(
                f"{name} takes queries and, if key_padding='both', oddly many keys, got {size}"
            )
        kernel = torch.zeros(self.heads, 1, *size)
        kernel[..., -1, self._left(size[1])] = 1.0
        return nn.Parameter(kernel)

    def _left(self, keys: int) -> int:
        """Of the kernel's keys, those before the score's own."""
        return {"both": keys // 2, "left": keys - 1, "right": 0}[self.key_padding]

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """convolve → mix → normalize → convolve → mix; scores that positions have changed come in."""
        hidden = scores == -torch.inf
        if inputs.valid_now is not None and inputs.context is None:
            hidden = hidden | ~inputs.valid_now[:, None, :, None]  # padding's rows enter no other
        scores = self._convolved(scores, hidden, self.kernel, "scores", inputs)
        if self.score_mix is not None:
            scores = torch.einsum("bhqk,gh->bgqk", scores, self.score_mix)
        weights = super().normalize(scores.masked_fill(hidden, -torch.inf), inputs)
        if self.after_kernel is not None:
            weights = self._convolved(weights, hidden, self.after_kernel, "weights", inputs)
        groups = weights.unflatten(1, self.head_mix.shape[:2])
        weights = torch.einsum("bnhqk,nhg->bngqk", groups, self.head_mix).flatten(1, 2)
        return weights.masked_fill(hidden, 0.0)

    def _convolved(
        self, x: Tensor, hidden: Tensor, kernel: Tensor, name: str, inputs: Inputs
    ) -> Tensor:
        """Scores or weights [batch, heads, queries, keys], each from its neighbourhood."""
        x = x.masked_fill(hidden, 0.0)
        before, keys = kernel.shape[2] - 1, kernel.shape[3]
        if (past := inputs.recall(name)) is None:
            past = x.new_zeros(*x.shape[:2], before, 0)
        x = torch.cat((pad(past, (0, x.shape[3] - past.shape[3])), x), dim=2)
        inputs.remember(name, x[:, :, x.shape[2] - before :])
        left = self._left(keys)
        return conv2d(pad(x, (left, keys - 1 - left)), kernel, groups=len(kernel))

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads normalised, scaled by depth, gated, joined and projected."""
        if self.norm is not None:
            heads = self.norm(heads) * self.factor
        if self.gate is not None:
            heads = heads * self.gate(heads).sigmoid()
        return super().output(heads, inputs)
