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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.masks import Mask


@mechanism("multi-token-attention", aliases=("mta",), reduces_to=Reduction(
    "softmax", {"norm": False}, lambda m, plain: plain.load_state_dict(m.state_dict(), strict=False)
))  # fmt: skip
class MultiToken(Attention):
    """Attention whose scores are convolved over queries and keys, and whose weights mix heads.

    Args:
        kernel: (c_q, c_k), queries and keys that a score depends on.
        after_kernel: the same for the convolution of the weights; none unless given.
        key_padding: "both" for odd many keys around the score's own, "left" or "right" for one side.
        mix_scores: a mixing of all heads' scores.
        head_kernel: heads whose weights are mixed, a divisor of `heads`; all unless given.
        norm: an RMS norm of each head.
        rescale: the norm's factor 1 − λ.
        gate: a gate on each head's output, one number or one for each channel.
        depth: layers below this one; `layer_idx` unless given.
    """

    claims = (
        Claim(
            "finds what only several tokens together identify",
            ours="multi-token-attention(kernel=[2,7], norm=False, head_kernel=1)",
            task="blocks(blocks=5, size=4, letters=12)",
            steps=800,
            layers=1,
        ),
    )

    memory_law = "quadratic"
    expected_failures: ClassVar[dict[str, str]] = {"static-cache": "no room for rows of scores"}

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, kernel: Sequence[int] = (6, 11),
        after_kernel: Sequence[int] | None = None,
        key_padding: Literal["both", "left", "right"] = "both", mix_scores: bool = False,
        head_kernel: int | None = None, norm: bool = True, rescale: bool = True,
        gate: Literal["scalar", "channels"] | None = None, depth: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(dim, heads, *args, **options)
        if key_padding not in ("both", "left", "right"):
            raise ValueError(f"key_padding must be 'both', 'left' or 'right', got {key_padding!r}")
        if gate not in (None, "scalar", "channels"):
            raise ValueError(f"gate must be 'scalar', 'channels' or None, got {gate!r}")
        group = heads if head_kernel is None else at_least_one("head_kernel", head_kernel)
        if heads % group:
            raise ValueError(f"head_kernel must divide heads={heads}, got {head_kernel}")
        self.key_padding = key_padding
        self.kernel = self._identity("kernel", *kernel)
        self.after_kernel = self._identity("after_kernel", *after_kernel) if after_kernel else None
        self.score_mix = nn.Parameter(torch.eye(heads)) if mix_scores else None
        self.head_mix = nn.Parameter(torch.eye(group).repeat(heads // group, 1, 1))
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5) if norm else None
        depth = self.layer_idx if depth is None else depth
        self.factor = 0.2 + 0.6 * math.exp(-0.3 * depth) if norm and rescale else 1.0
        width = 1 if gate == "scalar" else self.head_dim
        self.gate = nn.Linear(self.head_dim, width) if gate else None

    def _identity(self, name: str, queries: int, keys: int) -> nn.Parameter:
        if at_least_one(name, keys) % 2 == 0 and self.key_padding == "both":
            raise ValueError(f"{name} takes oddly many keys if key_padding='both', got {keys}")
        kernel = torch.zeros(self.heads, 1, at_least_one(name, queries), keys)
        kernel[..., -1, self._left(keys)] = 1.0
        return nn.Parameter(kernel)

    def _left(self, keys: int) -> int:
        """Of the kernel's keys, those before the score's own."""
        return {"both": keys // 2, "left": keys - 1, "right": 0}[self.key_padding]

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """score → convolve → mix → mask → normalize → convolve → mix, with all pairs in memory."""
        scores, offset = self.score(q, k, inputs), k.shape[2] - q.shape[2]
        if self.score_mod is not None:
            scores = self.score_mod(scores, *ops.indices(scores, offset))
        visible = ops.as_dense(mask, q.shape[2], k.shape[2], offset, q.device)
        hidden = None if visible is None else ~visible
        if inputs.valid_now is not None and inputs.context is None and hidden is not None:
            hidden = hidden | ~inputs.valid_now[:, None, :, None]  # padding's rows enter no other
        scores = self._convolved(scores, hidden, self.kernel, "scores", inputs)
        if self.score_mix is not None:
            scores = torch.einsum("bhqk,gh->bgqk", scores, self.score_mix)
        scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
        weights = self.normalize(scores)
        if self.after_kernel is not None:
            weights = self._convolved(weights, hidden, self.after_kernel, "weights", inputs)
        groups = weights.unflatten(1, self.head_mix.shape[:2])
        weights = torch.einsum("bnhqk,nhg->bngqk", groups, self.head_mix).flatten(1, 2)
        return weights if hidden is None else weights.masked_fill(hidden, 0.0)

    def _convolved(
        self, x: Tensor, hidden: Tensor | None, kernel: Tensor, name: str, inputs: Inputs
    ) -> Tensor:
        """Scores or weights [batch, heads, queries, keys], each from its neighbourhood."""
        x = x if hidden is None else x.masked_fill(hidden, 0.0)
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
