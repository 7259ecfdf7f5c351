"""Lookahead keys (CASTLE): a token's key goes on learning from the tokens after it.

    u_s^t     = Σ_{s < j ≤ t} σ(q̃_s·k̃_j / √d) ṽ_j               key of token s as token t finds it
    weights_t = softmax_s(q_t·k_s / √d − SiLU(q_t·u_s^t / √d))

There are n² of these u. So, block by block of queries I, with U the keys as the block before left
them and Σ_sj = σ(q̃_s·k̃_j / √d) for s < j in I, be it training, prefilling or one token decoded:

    q_I·u = q_I Uᵀ + tril(q_I ṽ_Iᵀ) Σᵀ          U ← U + Σ ṽ_I

A key after the query, where it is seen, has learned nothing yet; from padding none ever learns.
Cost: three more projections, two more passes over the pairs; memory linear in n forward, backward U
at every block, the blocks being computed again. A cache holds k, q̃, v and U.
Reduces to softmax attention when ṽ = 0.
Source: "Causal Attention with Lookahead Keys"; CASTLE-SWL is `window`, there 128 to 512 tokens. That
rotary positions turn q, k, q̃, k̃ and ṽ rests on a third party's program.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad, silu
from torch.utils.checkpoint import checkpoint

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.masks import Mask

#: Queries at a time.
BLOCK = 128


def _learn_nothing(castle: CastleLookaheadKeys, plain: Attention) -> None:
    castle.ahead_proj.weight.chunk(3)[2].zero_()
    plain.load_state_dict(castle.state_dict(), strict=False)


@mechanism("castle-lookahead-keys", aliases=("castle",),
           reduces_to=Reduction("softmax", {}, _learn_nothing))  # fmt: skip
class CastleLookaheadKeys(Attention):
    """Attention to keys that later tokens keep updating.

    Args:
        window: tokens after its own that may update a key; all of them unless given.
    """

    claims = (
        Claim(
            "keys that learn from later tokens predict better than causal keys",
            task="shakespeare-bytes",
            better="lower",
            steps=500,
            batch=16,
        ),
    )

    has_cross_form = False
    expected_failures: ClassVar[dict[str, str]] = {"static-cache": "tokens change earlier keys"}

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, window: int | None = None, **options: Any
    ) -> None:
        self.window = None if window is None else at_least_one("window", window)
        super().__init__(dim, heads, *args, **options)

    def make_projections(self) -> None:
        """The plain projections, and that of q̃, k̃ and ṽ, of as many heads as the keys."""
        super().make_projections()
        self.ahead_proj = nn.Linear(self.dim, 3 * self.kv_heads * self.head_dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """For each key head: its queries with k̃ and ṽ, which serve this pass alone; k with q̃; v."""
        q, k, v = super().project(inputs)
        ahead, shape = self.ahead_proj(inputs.tokens), "b t (three g d) -> three b g 1 t d"
        asking, k_new, v_new = rearrange(ahead, shape, three=3, d=self.head_dim)
        if inputs.valid_now is not None:
            v_new = v_new * inputs.valid_now[:, None, None, :, None]
        q = torch.cat((q.unflatten(1, (self.kv_heads, -1)), k_new, v_new), dim=2)
        return q.flatten(1, 2), torch.cat((k[:, :, None], asking), dim=2).flatten(1, 2), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Tensor:
        """The values summed, a block of queries at a time."""
        return self._blocks(q, k, v, mask, inputs)

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """The weights of all pairs."""
        return self._blocks(q, k, None, mask, inputs)

    def _blocks(
        self, q: Tensor, k: Tensor, v: Tensor | None, mask: Mask | Tensor | None, inputs: Inputs
    ) -> Tensor:
        """Sums of values, or weights without them; lookahead keys go from block to block."""
        length, seen = q.shape[2], k.shape[2] - q.shape[2]
        if (u := inputs.recall("lookahead")) is None:
            u = k.new_zeros(len(k), self.kv_heads, 1, seen, self.head_dim)

        def block(u: Tensor, start: int) -> tuple[Tensor, Tensor]:
            rows, offset = slice(start, start + BLOCK), seen + start
            scores, u = self._scores(q[:, :, rows], k, u)
            if self.score_mod is not None:
                scores = self.score_mod(scores, *ops.indices(scores, offset))
            part = mask[:, :, rows] if isinstance(mask, Tensor) and mask.shape[2] > 1 else mask
            visible = ops.as_dense(part, scores.shape[2], scores.shape[3], offset, q.device)
            if visible is not None:
                scores = scores.masked_fill(~visible, -torch.inf)
            weights = self.normalize(scores)
            return (weights if v is None else self.aggregate(weights, v, inputs)), u

        done, again = [], length > BLOCK and torch.is_grad_enabled()
        for start in range(0, length, BLOCK):
            out, u = checkpoint(block, u, start, use_reentrant=False) if again else block(u, start)
            done.append(out)
        inputs.remember("lookahead", u)
        return torch.cat(done, dim=2)

    def _scores(self, q: Tensor, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """A block's scores with all keys, and the lookahead keys when it has passed."""
        grouped = q.unflatten(1, (self.kv_heads, -1))
        q, k_new, v_new = self.scale * grouped[:, :, :-2], grouped[:, :, -2:-1], grouped[:, :, -1:]
        k, asking = k.unflatten(1, (self.kv_heads, 2)).chunk(2, dim=2)
        begin, end = u.shape[3], u.shape[3] + q.shape[3]
        first = 0 if self.window is None else max(0, begin - self.window)
        at = torch.arange(first, end, device=q.device)
        after = at[begin - first :] - at[:, None]
        updates = (after > 0) & (after <= (self.window or end))
        share = (self.scale * asking[..., first:end, :] @ k_new.mT).sigmoid() * updates
        plain, known, new = (q @ x.mT for x in (k, u, v_new))
        looked = silu(pad(known, (0, end - begin)) + pad(new.tril() @ share.mT, (first, 0)))
        grown = pad(u[..., first:, :], (0, 0, 0, end - begin)) + share @ v_new
        scores = (plain - pad(looked, (0, k.shape[3] - end))).flatten(1, 2)
        return scores, torch.cat((u[..., :first, :], grown), dim=3)
