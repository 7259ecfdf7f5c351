"""Lookahead keys (CASTLE): a token's key goes on learning from the tokens after it.

    u_s^t     = Σ_{s < j ≤ t} σ(q̃_s·k̃_j / √d) ṽ_j               key of token s as token t finds it
    weights_t = softmax_s(q_t·k_s / √d − SiLU(q_t·u_s^t / √d))

There are n² of these u. So, block by block of queries I, with U the keys as the block before left
them and Σ_sj = σ(q̃_s·k̃_j / √d) for s < j in I, be it training, prefilling or one token decoded:

    q_I·u = q_I Uᵀ + tril(q_I ṽ_Iᵀ) Σᵀ          U ← U + Σ ṽ_I

A key after the query, where it is seen, has learned nothing yet; from padding none ever learns.
Cost: three more projections, two more passes over the pairs; memory linear in n forward, backward U
at every block, the blocks being computed again; by kernels, on a GPU, linear in both. A cache holds k,
q̃, v and U.
Reduces to softmax attention when ṽ = 0.
Source: "Causal Attention with Lookahead Keys"; CASTLE-SWL is `window`, there 128 to 512 tokens. That
rotary positions rotate q, k, q̃, k̃ and ṽ rests on a third party's program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option
from attlas.supports import Supports
from attlas.tracing import stretches

#: Queries at a time.
BLOCK = 128
#: What kernels compute as it stands here.
STAGES = ("normalize", "aggregate", "attend_by_blocks", "by_blocks", "block_scores")


def _learn_nothing(castle: CastleLookaheadKeys, plain: Attention) -> None:
    castle.ahead_proj.weight.chunk(3)[2].zero_()
    plain.load_state_dict(castle.state_dict(), strict=False)


@mechanism("castle-lookahead-keys", aliases=("castle",),
           reduces_to=Reduction("softmax", {}, _learn_nothing))  # fmt: skip
class CastleLookaheadKeys(Attention):
    """Attention to keys that later tokens keep updating."""

    claims = (
        Claim(
            "keys that learn from later tokens predict better than causal keys",
            task="shakespeare-bytes", better="lower", steps=500, batch=16,
        ),
    )  # fmt: skip
    supports = Supports(cross=False, remembers=True)
    expected_failures: ClassVar[dict[str, str]] = {
        "static-cache": "tokens change earlier keys",
        "told-positions": "keys are updated by the tokens that follow in order, whatever is seen",
    }

    window: int | None = option(
        "tokens after its own that may update a key; None: all of them", default=None, at_least=1
    )

    def setup(self) -> None:
        """The projection of q̃, k̃ and ṽ, which have as many heads as the keys."""
        super().setup()
        self.ahead_proj = nn.Linear(self.dim, 3 * self.kv_heads * self.head_dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Plain queries, keys and values; a cache also keeps q̃, while k̃ and ṽ serve this pass alone."""
        ahead = self.split_heads(self.ahead_proj(inputs.tokens))
        ahead = self.position_encoding.rotate(ahead, inputs.token_positions)
        asking, k_new, v_new = ahead.chunk(3, dim=1)
        if inputs.valid_now is not None:
            v_new = v_new * inputs.valid_now[:, None, :, None]
        inputs.carry("asking", asking)
        inputs.notes.update(k_new=k_new, v_new=v_new)
        return super().project(inputs)

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Scores of all pairs."""
        met = self.met(q, k, k, inputs)
        scores, u = self.by_blocks(met, inputs, lambda scores, start: scores)
        inputs.remember("lookahead", u[:, :, None])
        return scores

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """One call of kernels where they can take it, else the stages block by block."""
        met = self.met(q, k, v, inputs)
        if self.is_plain(inputs) and ops.lookahead_refuses(met) is None:
            valid = None if inputs.valid is None else inputs.valid[:, -k.shape[2] :]
            again = replace(inputs, cache=None)  # which a gradient need not hold
            out, u = ops.lookahead_attend(
                met, scale=self.scale, window=self.window, valid=valid,
                plain=lambda *tensors: self.attend_by_blocks(ops.LookaheadKeys(*tensors), again),
            )  # fmt: skip
        else:
            out, u = self.attend_by_blocks(met, inputs)
        inputs.remember("lookahead", u[:, :, None])
        return out

    def met(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> ops.LookaheadKeys:
        """All that meets in this pass; U as the pass before it left the keys."""
        u = inputs.recall("lookahead")
        if u is None:
            seen = k.shape[2] - q.shape[2]
            u = k.new_zeros(len(k), self.kv_heads, 1, seen, self.head_dim)
        asking, notes = inputs.carried["asking"], inputs.notes
        return ops.LookaheadKeys(q, k, v, asking, notes["k_new"], notes["v_new"], u[:, :, 0])

    def is_plain(self, inputs: Inputs) -> bool:
        """Whether weights are the softmax of these scores, of which causality and padding alone hide."""
        own = all(getattr(type(self), n) is getattr(CastleLookaheadKeys, n) for n in STAGES)
        drops = self.training and self.dropout > 0
        along = inputs.runs_along(self.pattern) and inputs.looks_back(self.pattern)
        return own and along and not drops and self.score_mod is None

    def attend_by_blocks(self, met: ops.LookaheadKeys, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Outputs, and U behind them, by the stages for one block of queries at a time, so that memory
        is linear in n."""
        q, k, v = met.q, met.k, met.v
        seen, pairs = k.shape[2] - q.shape[2], inputs.pairs
        change = inputs.by_positions(self.score_mod, k.shape[2])

        def summed(scores: Tensor, start: int) -> Tensor:
            if change is not None:
                scores = change(scores, *ops.indices(scores, seen + start))
            rows = slice(start, start + scores.shape[2])
            part = pairs[:, :, rows] if isinstance(pairs, Tensor) and pairs.shape[2] > 1 else pairs
            visible = ops.as_dense(part, scores.shape[2], k.shape[2], seen + start, q.device)
            if visible is not None:
                scores = scores.masked_fill(~visible, -torch.inf)
            return self.aggregate(self.normalize(scores, inputs), v, inputs)

        return self.by_blocks(met, inputs, summed)

    def by_blocks(
        self, met: ops.LookaheadKeys, inputs: Inputs, then: Callable[[Tensor, int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What `then` makes of each block's scores and first query; and U, which goes from block to
        block."""

        def block(u: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            scores, u = self.block_scores(met, u, rows)
            return then(scores, rows.start), u

        u = met.u
        done: list[Tensor] = []
        blocks = stretches(met.q.shape[2], BLOCK)
        for rows in blocks:
            out, u = ops.recomputed(block, u, rows, when=len(blocks) > 1)
            done.append(out)
        return torch.cat(done, dim=2), u

    def block_scores(self, met: ops.LookaheadKeys, u: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The scores of a block of queries with all keys, and U behind the block."""
        q = self.scale * met.q[:, :, rows].unflatten(1, (self.kv_heads, -1))
        k, asking, u = (x[:, :, None] for x in (met.k, met.asking, u))
        k_new, v_new = (x[:, :, None, rows] for x in (met.k_new, met.v_new))
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
        return scores, torch.cat((u[..., :first, :], grown), dim=3)[:, :, 0]
