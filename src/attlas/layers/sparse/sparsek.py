"""SparseK attention: every key is scored once, and each query reads the k best of what its window left.

    u_j   = w·x_j + ε j                                        one number for each key head
    p_i   = SparseK(u_0 … u_{i−W}, k) = clip(u − τ_i, 0, 1)    τ_i such that Σ_j p_ij = k; ones if ≤ k
    y_i   = Σ_j softmax_j(q_i·k_j / √d) p_ij v_j               over the W latest keys, whose p is 1, and
                                                               the k of largest u of those before them

SparseK(u, k) is the point of {p: 0 ≤ p ≤ 1, Σ p = k} nearest to u, and its Jacobian is I − 11ᵀ/|S| over
the keys S with 0 < p < 1. The scorer is trained through values, which p weighs, and through keys straight
through: k_j counts as p_ij k_j for gradients by p alone.

τ_i never falls as i grows. So a key whose p became 0, or which k better ones have followed, is never seen
again. Thresholds are found block by block of queries, from what is left of the candidates' numbers; a
`DynamicCache` holds W + k tokens for each key head, and beside them the numbers u > τ, which are k or
more, and at most k + 1 + (largest − smallest of w·x + 1) / ε.

Cost: n (W + k + block) pairs instead of n²; decoding reads W + k keys. Memory linear in n.
Reduces to causal softmax attention where k + W ≥ n.

What this rests on: the operator, its Jacobian, the score with its slope ε by position (with which scores
need not grow themselves to be chosen late in a text), the choice of the k best and their weighing by p
are the paper's. Not known, and chosen here: that every key head has a score of its own, that keys of the
window are no candidates, that keys are weighed straight through, and ε, k and W.
Source: "Sparser is Faster and Less is More: Efficient Sparse Attention for Long-Range Transformers".
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from attlas import masks, ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.hf.caches import DynamicCache
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.masks.algebra import Reach
from attlas.ops.reference import taken
from attlas.options import option
from attlas.remembering import layer_of, with_states
from attlas.storage.layer import StoredLayer
from attlas.storage.slots import first_ones
from attlas.supports import Supports
from attlas.tracing import any_length, stretches, traced

#: Queries of a block.
BLOCK = 128


@mechanism("sparsek-attention", aliases=("sparsek",), example={"keep": 3, "window": 2},
           reduces_to=Reduction("softmax", {"keep": 64}))  # fmt: skip
class SparseKAttention(Attention):
    """Causal attention to a window and to the k keys of largest learnt scores."""

    supports: ClassVar[Supports] = Supports(
        bidirectional=False, cross=False, masks="padding", counts=True, gaps=False, remembers=True
    )
    beyond: ClassVar[tuple[str, ...]] = (
        "project: the score of a key is told beside it",
        "score: keys are weighed for the gradient alone",
    )
    #: What is held would be dropped by a number of tokens that are there.
    roomy: ClassVar[bool] = False

    keep: int = option("k, keys that a query sees besides its window", default=512, at_least=1)
    window: int = option("W, latest keys that a query sees, its own among them", default=512, at_least=1)
    slope: float = option("ε, by which the score of a key grows with its place", default=1e-3, at_least=0)

    def make_projections(self) -> None:
        """And what scores the tokens."""
        super().make_projections()
        self.scorer = nn.Linear(self.dim, self.kv_heads, bias=False)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; beside each key its w·x."""
        inputs.carry("scores", self.scorer(inputs.x).transpose(1, 2)[..., None])
        return super().project(inputs)

    def restore(self, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """All that is held; the cache then lets go of what no later token sees."""
        held, pool = layer_of(inputs.cache, self.layer_idx), inputs.recall("pool")
        slots, total = k.shape[2], inputs.key_positions.shape[-1]
        if pool is not None and isinstance(held, StoredLayer) and held.index is not None:
            columns = held.dense_positions().long()
        else:
            inputs.check_places(slots)
            columns = torch.arange(total - slots, total, device=k.device).expand(*k.shape[:2], -1)
        there = columns >= 0
        if inputs.valid is not None:
            there = there & inputs.valid.gather(1, columns.clamp(min=0).flatten(1)).view_as(columns)
        u = ops.wide(inputs.carried["scores"][..., 0])
        u = u + self.slope * columns.to(u.dtype)
        u = u.masked_fill(~there, -torch.inf)
        tau, least, pool = thresholds(
            u, columns - (total - inputs.x.shape[1] - self.window), self.keep, inputs.x.shape[1], pool
        )
        inputs.notes |= {"u": u, "columns": columns, "tau": tau, "least": least}
        own = not isinstance(held, StoredLayer) or not (held.learned or held.bodies)
        plain = type(inputs.cache) is DynamicCache and not getattr(inputs.cache, "recorded", False)
        if own and plain and self.door is None and self.score_mod is None and not traced():
            assert inputs.cache is not None
            stays = there & ((columns > total - 1 - self.window) | (u >= least[..., -1:]))
            if not stays.all():
                with_states(inputs.cache, self.layer_idx).keep(*first_ones(stays))
            inputs.remember("pool", pool.detach())
        return k, v

    def mask(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Mask | Bool[Tensor, "b h queries keys"] | None:
        """The window, and what was chosen of the keys before it."""
        u, columns, least = (inputs.notes[name] for name in ("u", "columns", "least"))
        first, slot = (keys - q.shape[2] for keys in (inputs.key_positions.shape[-1], k.shape[2]))
        chosen = Selected(u, columns, least, first, slot, self.window)
        return masks.by_groups(chosen, self.heads // self.kv_heads)

    def shares(
        self, u: Float[Tensor, "batch kv_heads keys"], columns: Integer[Tensor, "batch kv_heads keys"],
        tau: Float[Tensor, "batch kv_heads queries"], at: Integer[Tensor, " queries"], like: Tensor,
    ) -> Float[Tensor, "batch heads queries keys"]:  # fmt: skip
        """p of the keys for the queries that stand in columns `at`."""
        near = columns[:, :, None] > (at[:, None] - self.window)
        p = share(u[:, :, None], tau[..., None]).masked_fill(near, 1.0)
        return ops.repeated(p, self.heads).to(like.dtype)

    def _all_shares(self, like: Tensor, inputs: Inputs) -> Tensor:
        total = inputs.key_positions.shape[-1]
        at = torch.arange(total - like.shape[2], total, device=like.device)
        u, columns, tau = (inputs.notes[name] for name in ("u", "columns", "tau"))
        return self.shares(u, columns, tau, at, like)

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Float[Tensor, "batch heads queries keys"]:
        """Scores, whose gradients weigh keys by p."""
        scores = super().score(q, k, inputs)
        return through(scores, self._all_shares(scores, inputs))

    def normalize(
        self, scores: Float[Tensor, "batch heads queries keys"], inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Softmax, then p."""
        return super().normalize(scores, inputs) * self._all_shares(scores, inputs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Block by block of queries, over the keys that one of them sees."""
        queries, slots = q.shape[2], k.shape[2]
        if not isinstance(inputs.pairs, Mask) or self.score_mod is not None or any_length(slots):
            return super().attend(q, k, v, inputs)
        u, columns, tau, least = (inputs.notes[name] for name in ("u", "columns", "tau", "least"))
        first, out = inputs.key_positions.shape[-1] - queries, []
        for rows in stretches(queries, BLOCK):
            at = torch.arange(first + rows.start, first + rows.stop, device=q.device)
            near = (columns > at[0] - self.window) & (columns <= at[-1])
            far = (columns <= at[0] - self.window) & (u >= least[..., rows][..., :1])
            alive = (u > -torch.inf) & (near | far)
            most = slots if traced() else most_of(alive)
            chosen = alive.byte().topk(most, sorted=False).indices
            out.append(ops.recomputed(
                self._block, q[:, :, rows], taken(k, chosen), taken(v, chosen), u.gather(-1, chosen),
                columns.gather(-1, chosen), tau[..., rows], least[..., rows], at, when=len(at) < queries,
            ))  # fmt: skip
        return torch.cat(out, dim=2)

    def _block(
        self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, columns: Tensor, tau: Tensor, least: Tensor,
        at: Tensor,
    ) -> Float[Tensor, "batch heads queries width"]:  # fmt: skip
        """The stages from score to aggregate for some queries and the keys gathered for them."""
        scores = ops.grouped_product(q * self.scale, k.mT)
        p = self.shares(u, columns, tau, at, scores)
        seen = visible(u[:, :, None], columns[:, :, None], least[..., None], at[:, None], self.window)
        scores = through(scores, p).masked_fill(~ops.repeated(seen, self.heads), -torch.inf)
        weights = torch.dropout(ops.softmax(scores) * p, self.dropout, self.training)
        return ops.grouped_product(weights, v)


def through(scores: Tensor, p: Tensor) -> Tensor:
    """Scores, with the gradient by p that p · score has."""
    return scores + scores * (p - p.detach())


def visible(u: Tensor, columns: Tensor, least: Tensor, at: Tensor, window: int) -> Tensor:
    """Whether queries in columns `at`, whose k best candidates begin at `least`, see these keys."""
    near = (columns > at - window) & (columns <= at)
    return (u > -torch.inf) & (near | (columns <= at - window) & (u >= least))


class Selected(Mask):
    """The window, and of the keys before it those whose score is large enough.

    Args:
        u: score of each slot's key, −∞ where there is none.
        columns: where that key stands.
        least: smallest score that each query reads.
        first: where the first query stands.
        slot: which slot that is.
        window: latest keys.
    """

    def __init__(
        self, u: Float[Tensor, "batch kv_heads slots"], columns: Integer[Tensor, "batch kv_heads slots"],
        least: Float[Tensor, "batch kv_heads queries"], first: int, slot: int, window: int,
    ) -> None:  # fmt: skip
        self.u, self.columns, self.least = u.detach(), columns, least.detach()
        self.first, self.slot, self.window = first, slot, window
        self.batch, self.heads = u.shape[:2]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Boolean tensor over the broadcast of the index tensors."""
        u, columns, least = (x.to(k.device) for x in (self.u, self.columns, self.least))
        row = (q - self.slot).clamp(0, least.shape[2] - 1)
        inside = k.clamp(max=u.shape[2] - 1)
        return visible(
            u[b, h, inside], columns[b, h, inside], least[b, h, row], row + self.first, self.window
        )

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        """(some, every): which keys of a block were chosen is only looked up pair by pair."""
        some = k_lo <= q_hi
        return some, some & False

    def __repr__(self) -> str:
        return f"sparsek({tuple(self.u.shape)}, window={self.window})"


@ops.exact
def sparsek(z: Float[Tensor, "*rows n"], k: int) -> Float[Tensor, "*rows n"]:
    """The point of {p: 0 ≤ p ≤ 1, Σ p = k} nearest to z; ones where z has no more than k finite numbers.

    Raises:
        ValueError: a k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    tau, _ = threshold(z, k)
    return share(z, tau[..., None])


def share(z: Tensor, tau: Tensor) -> Tensor:
    """clip(z − τ, 0, 1), 0 where z is −∞."""
    none = z == -torch.inf
    return (z.masked_fill(none, 0.0) - tau).clamp(0, 1).masked_fill(none, 0.0)


def most_of(there: Bool[Tensor, "batch heads n"]) -> int:
    """How many are there in the row that has most."""
    return int(there.sum(-1).max()) if there.numel() else 0


def threshold(
    z: Float[Tensor, "*rows n"], k: int
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """(τ with Σ clip(z − τ, 0, 1) = k, the k-th largest of z); −∞ where no more than k are finite."""
    n = z.shape[-1]
    none = z.new_full(z.shape[:-1], -torch.inf)
    if n <= k:
        return none, none
    with torch.no_grad():
        down = z.sort(-1, descending=True).values
        there = down > -torch.inf
        centred = (down - down[..., :1]).masked_fill(~there, 0.0)  # so that sums stay small
        sums = torch.cat((torch.zeros_like(centred[..., :1]), centred.cumsum(-1)), dim=-1)
        rising = (-centred).masked_fill(~there, torch.inf).contiguous()
        order = torch.arange(n, device=z.device).expand_as(down)
        # Σ clip(z − β, 0, 1) at β = z_j − 1, where those up to j give 1, and at β = z_j, where later ones
        # give 0.
        some = torch.searchsorted(rising, (1 - centred).contiguous(), right=False)
        low = order + 1 + sums.gather(-1, some) - sums[..., 1:] - (some - order - 1) * (centred - 1)
        full = torch.searchsorted(rising, (-centred - 1).contiguous(), right=True)
        high = full + sums[..., :-1] - sums.gather(-1, full) - (order - full) * centred
        ones = (there & (low <= k)).sum(-1, keepdim=True)
        some = (there & (high < k)).sum(-1, keepdim=True)
        kth = down[..., k - 1]
        enough = there[..., k]
        # By value, so that gradients find the same keys in z itself.
        upper = torch.where(ones > 0, down.gather(-1, (ones - 1).clamp(min=0)), torch.inf)
        lower = down.gather(-1, (some - 1).clamp(min=0))
        inner = (z < upper) & (z >= lower)
        ones, count = (z >= upper).sum(-1), inner.sum(-1)
    mean = (z.masked_fill(~inner, 0.0).sum(-1) + ones - k) / count.clamp(min=1)
    tau = torch.where(count > 0, mean, kth - 1)
    return torch.where(enough, tau, none), torch.where(enough, kth, none)


@ops.exact
def thresholds(
    u: Float[Tensor, "batch kv_heads slots"], rank: Integer[Tensor, "batch kv_heads slots"], k: int,
    queries: int, pool: Float[Tensor, "batch kv_heads left"] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(τ, the k-th largest candidate) of each query, and the candidates that later ones need.

    Args:
        u: score of the key in each slot.
        rank: the query, counted in this pass, of which the key becomes a candidate; below 0 before it.
        k: how many are chosen.
        queries: of this pass.
        pool: what the pass before left; unless given, all slots are looked at.
    """
    now = rank.clamp(-1, queries) + 1  # 0: a candidate before, `queries` + 1: none yet
    empty = torch.full((*u.shape[:2], queries + 2), -torch.inf, dtype=u.dtype, device=u.device)
    entering = empty.scatter(-1, now, u)[..., 1:-1]
    if pool is None:
        pool = u.masked_fill(rank >= 0, -torch.inf)
    found = []
    for rows in stretches(queries, BLOCK):
        new = entering[..., rows]
        count = new.shape[-1]
        later = torch.ones(count, count, dtype=torch.bool, device=u.device).triu(1)
        each = torch.cat((
            pool[:, :, None].expand(-1, -1, count, -1),
            new[:, :, None].expand(-1, -1, count, -1).masked_fill(later, -torch.inf),
        ), dim=-1)  # fmt: skip
        found.append(ops.recomputed(threshold, each, k, when=count < queries))
        pool = torch.cat((pool, new), dim=-1)
        tau = found[-1][0][..., -1:]
        left = pool.masked_fill(pool <= tau, -torch.inf)
        if not traced():
            left = left.topk(most_of(left > -torch.inf), dim=-1).values
        pool = left
    tau, least = (torch.cat(each, dim=-1) for each in zip(*found, strict=True))
    return tau, least, pool
