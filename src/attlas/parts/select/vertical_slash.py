"""Vertical and slash: the last queries tell which keys, and which distances, each head reads.

    A         softmax of the last queries' scores
    vertical  the v keys j of largest Σ_i A_ij             the first ones always among them
    slash     the s distances d of largest Σ_i A_i,i−d     the shortest always among them
    pairs     j in vertical, or the blocks of queries and of keys that a slash crosses; j ≤ i

Verticals are single keys, and slashes are read in whole blocks: two attentions over keys apart, joined
by their sums, so that no single key makes its block one that is looked at pair by pair. A change of
scores by the model (ALiBi, soft caps) is not part of the estimate. Decoding reads everything.

Cost: last·n scores, and v + 2·s keys a query at most. Reduces to full attention where v covers the
prompt.

Source: a pattern of "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
Attention".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from attlas import masks, ops
from attlas.attach.thinned import Text, Thinned
from attlas.catalog.registry import mechanism
from attlas.masks import Mask
from attlas.ops.memory_efficient import at_least_float32
from attlas.ops.reference import softmax
from attlas.options import option
from attlas.tracing import stretches

#: Queries that meet all single keys at once.
ROWS = 2048


@mechanism(
    "vertical-slash", paper="",
    example={"verticals": 3, "slashes": 4, "first": 2, "near": 2, "last": 4, "size": 2},
)  # fmt: skip
class VerticalSlash(Thinned):
    """Let tokens read the keys and the distances that the last queries weigh most, head by head."""

    everything: ClassVar[dict[str, Any]] = {"verticals": 10**6}
    comparable: ClassVar[tuple[str, ...]] = (
        "(verticals=300, slashes=160)",
        "(verticals=300, slashes=100)",
    )

    verticals: int = option("keys that all later tokens read", default=1000, at_least=1)
    slashes: int = option("distances at which each token reads", default=6096, at_least=1)
    first: int = option("first keys that are among the verticals", default=30, at_least=0)
    near: int = option("shortest distances that are among the slashes", default=100, at_least=1)
    last: int = option("last queries that are asked", default=64, at_least=1)
    size: int = option("tokens of a block", default=64, at_least=1)

    def pattern(self, text: Text) -> Mask:
        """Blocks that slashes cross, and single keys."""
        vertical, slash = self.estimate(text)
        crossed = masks.Pages(
            self.crossed(text, slash), (self.size, self.size), first=text.offset
        )
        return crossed | masks.Pages(vertical[:, :, None], (text.q.shape[2], 1), first=text.offset)

    def attended(self, text: Text) -> Float[Tensor, "batch heads queries v_dim"]:
        """The blocks, and beside them the single keys of the other blocks."""
        if text.score_mod is not None or text.sinks is not None or text.seen is not None:
            return super().attended(text)
        pattern = self.pattern(text)
        self.density[text.layer] = self.share(pattern & masks.causal, text)
        crossed, single = (leaf for leaf in pattern.leaves if isinstance(leaf, masks.Pages))
        of_blocks = ops.attend(
            text.q, text.k, text.v, mask=crossed & masks.causal, scale=text.scale, return_lse=True
        )
        return ops.merge([of_blocks, self.singles(text, crossed, single.held[:, :, 0].long())])[0]

    def singles(
        self, text: Text, crossed: masks.Pages, at: Int[Tensor, "batch heads verticals"]
    ) -> tuple[Float[Tensor, "batch heads queries v_dim"], Float[Tensor, "batch heads queries"]]:
        """(out, lse) over single keys, without those in blocks that a slash crosses."""
        size, device, keys = self.size, text.q.device, text.k.shape[2]
        listed = pad(crossed.listed, (0, -(-keys // size) - crossed.listed.shape[3]))
        block = (at // size)[:, :, None].expand(-1, -1, listed.shape[2], -1)
        beside = listed.gather(-1, block)
        of_group = at.unflatten(1, (text.k.shape[1], -1)).flatten(2, 3)[..., None]
        k, v = (
            x.gather(2, of_group.expand(-1, -1, -1, x.shape[3])).view(*at.shape, x.shape[3])
            for x in (text.k, text.v)
        )
        found = []
        for rows in stretches(text.q.shape[2], ROWS):
            row = torch.arange(text.q.shape[2], device=device)[rows]
            hidden = (at[:, :, None] > text.offset + row[:, None]) | beside[:, :, row // size]
            scores = at_least_float32(text.q[:, :, rows] @ k.mT) * text.scale
            scores = scores.masked_fill(hidden, -torch.inf)
            weights = softmax(scores).to(v.dtype)
            found.append((weights @ v, torch.logsumexp(scores, -1)))
        out, lse = (torch.cat(x, dim=2) for x in zip(*found, strict=True))
        return out, lse

    def share(self, mask: Mask, text: Text) -> Float[Tensor, " heads"]:
        """By blocks that slashes cross, and by single keys in the others."""
        crossed, single = (leaf for leaf in mask.leaves if isinstance(leaf, masks.Pages))
        size, device = self.size, text.q.device
        row, block = (
            torch.arange(-(-x.shape[2] // size), device=device) for x in (text.q, text.k)
        )
        begun = block * size < text.offset + (row[:, None] + 1) * size
        on = pad(crossed.listed, (0, len(block) - crossed.listed.shape[3]))
        at = single.held[:, :, 0].long() // size
        verticals = torch.zeros(*at.shape[:2], len(block), device=device)
        verticals.scatter_add_(-1, at, torch.ones_like(at, dtype=verticals.dtype))
        read = torch.where(on, size, verticals[:, :, None]) * begun
        return read.mean(0).sum((-1, -2)) / (begun.sum() * size)

    def estimate(
        self, text: Text
    ) -> tuple[Int[Tensor, "batch heads verticals"], Int[Tensor, "batch heads slashes"]]:
        """(keys, distances) that each head reads, ascending."""
        keys = text.k.shape[2]
        weights = self.weights(text)
        place = torch.arange(keys - weights.shape[2], keys, device=weights.device)[:, None]
        away = place - torch.arange(keys, device=weights.device)
        by_distance = weights.gather(-1, away.clamp(min=0).expand_as(weights))
        columns = weights.sum(2)
        diagonals = by_distance.masked_fill(away < 0, 0.0).sum(2)
        columns[..., : self.first], diagonals[..., : self.near] = torch.inf, torch.inf
        return ops.best_pages(columns, self.verticals), ops.best_pages(diagonals, self.slashes)

    def weights(self, text: Text) -> Float[Tensor, "batch heads last keys"]:
        """What the last queries see, in float32."""
        q = text.q[:, :, -self.last :]
        keys, rows = text.k.shape[2], q.shape[2]
        scores = ops.grouped_product(q, text.k.mT)
        later = torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(keys - rows + 1)
        found: Tensor = (scores.float() * text.scale).masked_fill(later, -torch.inf).softmax(-1)
        return found

    def crossed(
        self, text: Text, slash: Int[Tensor, "batch heads slashes"]
    ) -> Int[Tensor, "batch heads q_blocks count"]:
        """Lists of the key blocks that slashes cross, as far from each block of queries in every row."""
        size, tokens, device = self.size, text.k.shape[2], slash.device
        rows, blocks = -(-text.q.shape[2] // size), -(-tokens // size)
        # A block of queries at place a meets with distance d the keys a − d to a − d + size − 1.
        begin = text.offset - slash.long()
        lags = torch.cat([begin, begin + size - 1], dim=-1).div(size, rounding_mode="floor")
        on = torch.zeros(*slash.shape[:2], rows + blocks + 1, dtype=torch.bool, device=device)
        on.scatter_(-1, lags + rows, True)
        row, block = torch.arange(rows, device=device)[:, None], torch.arange(blocks, device=device)
        end = text.offset + (row + 1) * size
        return ops.as_lists(on[:, :, block - row + rows] & (block * size < end))
