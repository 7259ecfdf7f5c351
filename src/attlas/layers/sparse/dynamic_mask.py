"""Dynamic mask attention (DMA): values tell which keys are kept, and how much each of them counts.

    b_j       = exp(A softplus(W_dt v_j))      one number for each key head; v_j: the values of all heads
    seen(i)   = the w visible keys j with the largest b_j
    weights_i = softmax over seen(i) of (q_i·k_j / √d + b_j)

`form="linear"` adds A softplus(W_dt v_j) instead, the exponent alone, as the authors' kernels do. A
starts at 0, where all keys are equal: of equal keys the newest are kept.

A key's b_j is the same for every query, so that under causality a key which w better ones have followed
is never seen again: key j is seen by the queries j ≤ i < until_j. A block of queries then meets the w
keys that the blocks before left it, and its own.

Cost: n (w + block) pairs instead of n², memory linear in n; with masks other than causality and padding,
all pairs are looked at. A cache keeps every key, and b_j beside it.
Reduces to softmax attention at A = 0 and w ≥ n.
Source: "Trainable Dynamic Mask Sparse Attention"; its authors' model norms queries and keys besides.
Which of equal keys are kept is not said there.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from attlas import masks, ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.masks.algebra import Reach
from attlas.ops.reference import taken
from attlas.options import option
from attlas.tracing import any_length, stretches

#: Queries of a block.
BLOCK = 128


def _all_equal(layer: Attention, plain: Attention) -> None:
    nn.init.zeros_(layer.get_parameter("A"))
    plain.load_state_dict(layer.state_dict(), strict=False)


@mechanism("dynamic-mask-attention", aliases=("dma",), example={"keep": 4},
           reduces_to=Reduction("softmax", {"keep": 64}, _all_equal))  # fmt: skip
class DynamicMaskAttention(Attention):
    """Attention of every query to the w keys that their values make the most important."""

    changes = ("score", "mask")
    beyond: ClassVar[tuple[str, ...]] = ("project: how important a key is, is told by its value",)
    roomy: ClassVar[bool] = False  # hidden keys would be among the best

    keep: int = option("w, keys that a query sees", default=2048, at_least=1)
    form: Literal["exponential", "linear"] = option(
        "what is added to scores: exp(A softplus(·)), or its exponent", default="exponential"
    )

    def setup(self) -> None:
        """A, and the projection of all heads' values."""
        super().setup()
        self.A = nn.Parameter(torch.zeros(self.kv_heads))
        self.dt_proj = nn.Linear(self.kv_heads * self.head_dim, self.kv_heads, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; beside each key W_dt v, which caches need not round again."""
        q, k, v = super().project(inputs)
        inputs.carry("dt", self.dt_proj(v.transpose(1, 2).flatten(2)).transpose(1, 2)[..., None])
        return q, k, v

    def importance(self, inputs: Inputs) -> Float[Tensor, "batch kv_heads keys"]:
        """b of every key."""
        b = self.A[:, None] * softplus(ops.wide(inputs.carried["dt"][..., 0]))
        return b.exp() if self.form == "exponential" else b

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """One more channel, whose product is b, so that the fused routes stay."""
        b = self.importance(inputs)[..., None].to(k.dtype)
        return torch.cat((q, torch.full_like(q[..., :1], 1 / self.scale)), -1), torch.cat((k, b), -1)

    def mask(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Mask | Bool[Tensor, "b h queries keys"] | None:
        """Of the keys that a query may see, the w most important."""
        seen, keys = super().mask(q, k, inputs), k.shape[2]
        if not any_length(keys) and keys <= self.keep:
            return seen
        b = self.importance(inputs).detach()
        if (self.pattern if inputs.valid is not None else seen) not in (None, masks.causal):
            visible = ops.as_dense(seen, q.shape[2], keys, keys - q.shape[2], q.device)
            assert visible is not None
            return ops.repeated(best(b, visible, self.keep), q.shape[1])
        if inputs.valid is not None:
            b = b.masked_fill(~inputs.valid[:, None, -keys:], -torch.inf)
        causal = masks.causal in (self.pattern, seen)
        until = seen_until(b, self.keep, keys - q.shape[2] if causal else keys)
        return Kept(until.masked_fill(b == -torch.inf, 0), q.shape[1], causal)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Block by block of queries, over the keys that one of them sees."""
        pairs, queries, keys = inputs.pairs, q.shape[2], k.shape[2]
        if not isinstance(pairs, Kept) or self.score_mod is not None or any_length(keys):
            return super().attend(q, k, v, inputs)
        q, k = self.features(q, k, inputs)
        out = []
        for rows in stretches(queries, BLOCK if pairs.causal else queries):
            first, end = (rows.start + keys - queries, rows.stop + keys - queries)
            reached, count = (end, end - first) if pairs.causal else (keys, 0)
            alive = pairs.until[..., :reached] > (first if pairs.causal else 0)
            at = alive.byte().topk(min(self.keep + count, reached), sorted=False).indices
            until = pairs.until.gather(-1, at)[:, :, None]
            query = torch.arange(first, end, device=q.device)[:, None]
            shown = (at[:, :, None] <= query) & (query < until) if pairs.causal else until > 0
            out.append(ops.attend(
                q[:, :, rows], taken(k, at), taken(v, at), mask=ops.repeated(shown, q.shape[1]),
                scale=self.scale, dropout=self.dropout if self.training else 0.0,
            ))  # fmt: skip
        return torch.cat(out, dim=2)


class Kept(Mask):
    """Keys from themselves on, if causal, up to the first query that no longer keeps them.

    Args:
        until: that query's slot, for each key head; if not causal, 0 for keys that nobody keeps.
        heads: of the queries.
        causal: queries see no later keys.
    """

    def __init__(self, until: Int[Tensor, "batch kv_heads keys"], heads: int, causal: bool) -> None:
        self.until, self.heads, self.causal = until, heads, causal
        self.batch = len(until)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Boolean tensor over the broadcast of the index tensors."""
        group = (self.heads or 1) // self.until.shape[1]
        until = self.until.to(k.device)[b, h // group, k]
        return (k <= q) & (q < until) if self.causal else (until > 0) & (q == q)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        """(some, every): which keys of a block are kept is only looked up pair by pair."""
        some = k_lo <= q_hi if self.causal else (k_lo == k_lo) & (q_lo == q_lo)
        return some, some & False


def best(
    b: Float[Tensor, "batch kv_heads keys"], visible: Bool[Tensor, "b h queries keys"], keep: int
) -> Bool[Tensor, "batch h queries keys"]:
    """The `keep` most important keys among those that each query may see."""
    b = ops.repeated(b, max(b.shape[1], visible.shape[1]))[:, :, None]
    ranked = newest_first(b.masked_fill(~visible, -torch.inf))[..., :keep]
    shape = (*b.shape[:2], *visible.shape[2:])
    return visible & torch.zeros(shape, dtype=torch.bool, device=b.device).scatter(-1, ranked, True)


def newest_first(b: Float[Tensor, "*rows keys"]) -> Int[Tensor, "*rows keys"]:
    """Keys from the most important to the least, of equal ones the newest first."""
    return b.shape[-1] - 1 - b.flip(-1).argsort(dim=-1, descending=True, stable=True)


def seen_until(
    b: Float[Tensor, "batch kv_heads keys"], keep: int, first: int
) -> Int[Tensor, "batch kv_heads keys"]:
    """The first query, by slot, that sees `keep` keys better than key j; the number of keys where
    the last query still sees it, 0 where query `first` lost it long ago."""
    keys = b.shape[-1]
    held = newest_first(b[..., :first])[..., :keep]
    until = torch.zeros_like(b, dtype=torch.long).scatter(-1, held, keys)
    for rows in stretches(keys - first, BLOCK):
        begin, count = first + rows.start, rows.stop - rows.start
        at = torch.arange(begin, begin + count, device=b.device).expand(*b.shape[:2], -1)
        new, old = b[..., begin : begin + count], b.gather(-1, held)
        order = torch.arange(count, device=b.device)
        later, earlier = order > order[:, None], order < order[:, None]
        # Better keys before a new one stand still; those after it come query by query.
        ahead = (old[..., None, :] > new[..., None]).sum(-1)
        ahead = ahead + ((new[..., None, :] > new[..., None]) & earlier).sum(-1)
        come = (new[..., None, :] >= new[..., None]) & later
        ranks = torch.arange(old.shape[-1], device=b.device)
        better = torch.cat((
            (new[..., None, :] >= old[..., None]).cumsum(-1) + ranks[:, None],
            come.cumsum(-1) + ahead[..., None],
        ), dim=-2)  # fmt: skip
        until = until.scatter(-1, torch.cat((held, at), -1), begin + (better < keep).sum(-1))
        among, where = torch.cat((new.flip(-1), old), -1), torch.cat((at.flip(-1), held), -1)
        held = where.gather(-1, among.argsort(dim=-1, descending=True, stable=True))[..., :keep]
    return until
