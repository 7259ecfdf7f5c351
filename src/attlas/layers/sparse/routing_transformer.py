"""Routing transformer: tokens meet in clusters, which online spherical k-means finds.

    c's queries  = the w queries with the largest q/|q| · μ_c,   its keys alike,   w = ⌈n / k⌉
    y_t          = mean over the clusters c of query t: softmax over c's keys (q_t kᵀ / √d) v
    μ_c ← normed λ-running mean of the q/|q| and k/|k| nearest to μ_c, in training
    added to the loss: β · mean (x/|x| − nearest μ)²  over all queries and keys x

A token may be in several clusters, or in none, and then gets 0. With `shared` queries, as the paper has
them for causal text, a key is its token's query at length 1, and a token meets itself only where it meets
nobody else. Each cluster may have `memories`, learnt keys and values that all its queries see. The first
`local_heads` heads see the last `local_window` tokens instead.

Clusters choose over the whole text: with causal pairs, which earlier tokens are chosen still rests on
later ones. Behind a cache they choose among the tokens so far, so that decoding gives what the last token
of a whole pass over these would get.

Cost: n·k·d to route, k·w² pairs: n^1.5 where w = √n. Memory k·w².
Reduces to softmax attention at one cluster with w = n and queries of their own.
Source: "Efficient Content-Based Sparse Attention with Routing Transformers"; numbers as a third party's
program has them: lengths where the paper has LayerNorm without weights, and memories. Clusters in which
a query meets nobody do not count, where that program gives it keys to come. A cache is not theirs.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from attlas import masks, ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.network import moving
from attlas.ops.reference import taken
from attlas.options import option
from attlas.supports import Supports


def _alike(layer: Attention, plain: Attention) -> None:
    plain.load_state_dict(layer.state_dict(), strict=False)


class Members(NamedTuple):
    """The tokens of each cluster, in order, and which of them count: in padded rows the last do not."""

    at: Int[Tensor, "batch heads clusters w"]
    counts: Bool[Tensor, "batch heads clusters w"]

    def table(self, tokens: int) -> Bool[Tensor, "batch heads clusters tokens"]:
        """True at them."""
        none = torch.zeros(*self.at.shape[:3], tokens, dtype=torch.bool, device=self.at.device)
        return none.scatter(-1, self.at, self.counts)


@mechanism(
    "routing-transformer", example={"clusters": 3},
    reduces_to=Reduction("softmax", {"clusters": 1, "shared": False, "local_heads": 0}, _alike),
)  # fmt: skip
class RoutingTransformer(Attention):
    """Attention within clusters of queries and keys."""

    supports = Supports(cross=False, queries="all", memory="quadratic")
    changes = ("mask", "normalize")
    beyond: ClassVar[tuple[str, ...]] = ("project: tokens are routed as soon as they are projected",)
    roomy: ClassVar[bool] = False  # hidden keys could be chosen
    expected_failures: ClassVar[dict[str, str]] = dict.fromkeys(
        ("causality", "decoding", "decoding-padded", "static-cache", "beams", "told-while-decoding"),
        "clusters choose among the tokens of a whole pass, those to come too",
    )

    clusters: int = option("k, of each head", default=16, at_least=1)
    window: int | None = option("w, tokens that a cluster takes; ⌈n / k⌉ unless given", default=None,
                                at_least=1)  # fmt: skip
    shared: bool = option("whether keys are the queries", default=True)
    local_heads: int = option(
        "heads that see the tokens nearby, the first; half of them unless given", at_least=0,
        factory=lambda layer: layer.heads // 2,
    )  # fmt: skip
    local_window: int = option("tokens that local heads see", default=256, at_least=1)
    memories: int = option("learnt keys and values of each cluster", default=0, at_least=0)
    decay: float = option("λ, how much of a centroid stays in one training pass", default=0.999,
                          at_least=0, below=1)  # fmt: skip
    commitment: float = option("β, weight of the distances to centroids in the loss", default=1e-4,
                               at_least=0)  # fmt: skip

    def setup(self) -> None:
        """Centroids, and memories."""
        super().setup()
        if self.kv_heads != self.heads:
            raise ValueError(
                f"kv_heads must be heads={self.heads}, as each head has its clusters; got {self.kv_heads}"
            )
        self.routed_heads = self.heads - self.local_heads
        if self.routed_heads < 0:
            raise ValueError(f"local_heads must be 0 to heads={self.heads}, got {self.local_heads}")
        shape = self.routed_heads, self.clusters
        self.means: Tensor
        self.register_buffer("means", ops.unit(torch.randn(*shape, self.head_dim)))
        if self.memories and self.routed_heads:
            self.mem_key = nn.Parameter(torch.randn(*shape, self.memories, self.head_dim))
            self.mem_value = nn.Parameter(torch.randn(*shape, self.memories, self.head_dim))

    def make_projections(self) -> None:
        """As plain ones, but that shared queries need no keys."""
        super().make_projections()
        if self.shared:
            del self.k_proj

    @moving
    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; how near they are to the centroids goes beside the keys."""
        q, v = (self.split_heads(p(inputs.x)) for p in (self.q_proj, self.v_proj))
        k = ops.unit(q) if self.shared else self.split_heads(self.k_proj(inputs.x))
        normed = [ops.unit(x[:, self.local_heads :]) for x in ((k,) if self.shared else (q, k))]
        near = [x.detach() @ self.means.to(x.dtype).mT for x in normed]
        inputs.carry("near", torch.cat(near, dim=-1).transpose(1, 2).flatten(2)[:, None])
        self.auxiliary_loss = None
        if self.training and self.routed_heads:
            self.learn(torch.cat(normed, dim=2), torch.cat(near, dim=2), inputs)
        return q, k, v

    def learn(self, x: Tensor, near: Tensor, inputs: Inputs) -> None:
        """Ask queries and keys to keep near their centroids, and move those towards them."""
        valid = inputs.valid_now
        valid = torch.ones(x.shape[0], inputs.x.shape[1], device=x.device) if valid is None else valid
        each = valid.repeat(1, x.shape[2] // valid.shape[1]).to(x.dtype)[:, None, :, None]
        nearest = near.argmax(-1)
        words = self.means.to(x.dtype).expand(len(x), -1, -1, -1)
        apart = (x - words.take_along_dim(nearest[..., None], dim=2)).square() * each
        total = each.sum().clamp(min=1) * self.routed_heads * self.head_dim
        self.auxiliary_loss = self.commitment * apart.sum() / total
        with torch.no_grad():
            which = one_hot(nearest, self.clusters).to(self.means.dtype) * each.to(self.means.dtype)
            sums = ops.product(which.mT, x.to(self.means.dtype)).sum(0)
            found = torch.where((which.sum((0, 2)) > 0)[..., None], ops.unit(sums), self.means)
            self.means.lerp_(found, 1 - self.decay)

    def members(self, inputs: Inputs) -> tuple[Members, Members]:
        """The queries and the keys of each cluster, of all tokens so far."""
        near = inputs.carried["near"][:, 0].unflatten(-1, (self.routed_heads, -1)).movedim(1, -1)
        sides = [self._largest(x, inputs.valid) for x in near.split(self.clusters, dim=2)]
        return sides[0], sides[-1]

    def _largest(self, near: Float[Tensor, "b h clusters tokens"], valid: Tensor | None) -> Members:
        tokens = near.shape[-1]
        width = -(-tokens // self.clusters) if self.window is None else self.window
        width = min(width, tokens)
        if valid is None:
            at = near.topk(width, dim=-1).indices.sort(-1).values
            return Members(at, torch.ones_like(at, dtype=torch.bool))
        valid = valid[:, -tokens:]
        at = near.masked_fill(~valid[:, None, None], -torch.inf).topk(width, dim=-1).indices
        count = valid.sum(-1)[:, None, None, None]
        own = -(-count // self.clusters) if self.window is None else count.clamp(max=width)
        counts = (torch.arange(width, device=at.device) < own).expand_as(at)
        order = at.masked_fill(~counts, tokens).argsort(-1)
        return Members(at.gather(-1, order), counts)

    def nearby(self, q: Tensor, k: Tensor, inputs: Inputs) -> masks.Mask | Tensor | None:
        """Which pairs may meet in local heads."""
        return inputs.within(masks.both(self.pattern, masks.window(self.local_window)), q, k)

    def met(
        self, pairs: Bool[Tensor, "b h *more queries keys"], own: Tensor, memories: int = 0
    ) -> Bool[Tensor, "b h *more queries keys"]:
        """The pairs that count: shared queries meet their `own` keys where they meet nothing else."""
        if not self.shared:
            return pairs
        others = pairs & ~own
        return others if memories else others | (pairs & ~others.any(-1, keepdim=True))

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Float[Tensor, "b heads queries keys"]:
        """Cluster by cluster, over all pairs."""
        queries, keys, edge = q.shape[2], k.shape[2], self.local_heads
        scores = self.score(q, k, inputs)
        if (change := inputs.by_positions(self.score_mod, keys)) is not None:
            scores = change(scores, *ops.indices(scores, keys - queries))
        every = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
        seen, own = inputs.visible(q, k), every.tril(keys - queries).triu(keys - queries)
        seen = (every if seen is None else seen).expand(-1, self.heads, -1, -1)
        local, seen = seen.split([edge, self.routed_heads], dim=1)
        near = ops.as_dense(self.nearby(q, k, inputs), queries, keys, keys - queries, q.device)
        assert near is not None
        pairs = self.met(local & near.expand(-1, self.heads, -1, -1)[:, :edge], own)
        parts, scores = [self._softmax(scores[:, :edge], pairs, inputs)], scores[:, edge:]
        if not self.routed_heads:
            return parts[0]
        asking, told = (side.table(keys) for side in self.members(inputs))
        asking = asking[..., -queries:, None]
        total, kept = torch.zeros_like(scores), q.new_zeros(())
        count = torch.zeros_like(scores[..., :1])
        for c in range(self.clusters):
            pairs = self.met(seen & asking[:, :, c] & told[:, :, c, None], own, self.memories)
            each = scores
            if self.memories:
                each = torch.cat(((q[:, edge:] * self.scale) @ self.mem_key[:, c].mT, scores), dim=-1)
                pairs = torch.cat((asking[:, :, c].expand(*pairs.shape[:3], self.memories), pairs), -1)
            weights = self._softmax(each, pairs, inputs)
            count = count + pairs.any(-1, keepdim=True)
            total = total + weights[..., self.memories :]
            if self.memories:
                kept = kept + weights[..., : self.memories] @ self.mem_value[:, c]
        if self.memories:
            inputs.notes["kept"] = ops.divided(kept, count)
        return torch.cat((*parts, ops.divided(total, count)), dim=1)

    def _softmax(self, scores: Tensor, pairs: Tensor, inputs: Inputs) -> Tensor:
        return self.normalize(scores.masked_fill(~pairs, -torch.inf), inputs)

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Sums over values, and what memories add."""
        out = super().aggregate(weights, v, inputs)
        if not (self.memories and self.routed_heads):
            return out
        local, routed = out.split([self.local_heads, self.routed_heads], dim=1)
        return torch.cat((local, routed + inputs.notes["kept"]), dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Over the tokens that clusters take alone, where only causality and padding hide others."""
        edge, tokens, seen = self.local_heads, k.shape[2], Attention.mask(self, q, k, inputs)
        plain = (self.pattern if inputs.valid is not None else seen) in (None, masks.causal)
        if not plain or q.shape[2] != tokens or self.score_mod is not None:
            return self.aggregate(self.weigh(q, k, inputs), v, inputs)
        dropout = self.dropout if self.training else 0.0
        parts = []
        if edge:
            near = self.nearby(q, k, inputs)
            if self.shared:
                pairs = ops.as_dense(near, tokens, tokens, 0, q.device)
                assert pairs is not None
                near = self.met(pairs, torch.eye(tokens, dtype=torch.bool, device=q.device))
            parts = [ops.attend(*(x[:, :edge] for x in (q, k, v)), mask=near, scale=self.scale,
                                dropout=dropout)]  # fmt: skip
        if self.routed_heads:
            causal = masks.causal in (self.pattern, seen)
            q, k, v = (x[:, edge:] for x in (q, k, v))
            parts.append(self.routed(q, k, v, inputs, causal, dropout))
        return torch.cat(parts, dim=1)

    def routed(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, causal: bool, dropout: float
    ) -> Float[Tensor, "batch heads tokens width"]:
        """Attention within clusters, each of them a head of its own, and its mean over them."""
        asking, told = self.members(inputs)
        pairs = (asking.counts[..., None] & told.counts[..., None, :]).flatten(1, 2)
        asked, of = (x.at.flatten(1, 2) for x in (asking, told))
        pairs = pairs & (asked[..., None] >= of[:, :, None]) if causal else pairs
        pairs = self.met(pairs, asked[..., None] == of[:, :, None], self.memories)
        q, k, v = (
            taken(x, side.at.flatten(2)).unflatten(2, side.at.shape[2:]).flatten(1, 2)
            for x, side in ((q, asking), (k, told), (v, told))
        )
        if self.memories:
            k, v = (
                torch.cat((x.flatten(0, 1).expand(len(q), -1, -1, -1).to(q.dtype), y), dim=2)
                for x, y in ((self.mem_key, k), (self.mem_value, v))
            )
            every = asking.counts.flatten(1, 2)[..., None].expand(-1, -1, -1, self.memories)
            pairs = torch.cat((every, pairs), dim=-1)
        out = ops.attend(q, k, v, mask=pairs, scale=self.scale, dropout=dropout)
        at = asking.at.flatten(2)[..., None]
        count = pairs.any(-1).unflatten(1, asking.at.shape[1:3]).flatten(2)[..., None].to(out.dtype)
        out = out.unflatten(1, asking.at.shape[1:3]).flatten(2, 3) * count
        empty = out.new_zeros(len(out), self.routed_heads, inputs.x.shape[1], out.shape[-1])
        total = empty.scatter_add(2, at.expand_as(out), out)
        return ops.divided(total, empty[..., :1].scatter_add(2, at, count))
