"""Landmark attention: the last token of every block is its landmark, through which later tokens enter it.

Tokens are cut into blocks of L, the last of each being its landmark ℓ. With s = q kᵀ / √d, for query t

    g    = softmax of s over its own block up to t, and the landmarks of earlier blocks
    p_b  = softmax of s over the tokens of an earlier block b but its landmark
    weight of j:   g_j in t's own block;   g_ℓ · p_b(j) in block b, whose landmark is ℓ;   0 of landmarks

so rows sum to 1, and the landmark of t's own block counts for nobody, t being that landmark or not. With
`retrieve` = k each head of each query enters only the k earlier blocks of highest landmark score. Places
are then told afresh, so that none is further off than those k, however long the text: a chosen block
stands D blocks before t's,

    D = 1 + chosen blocks between it and t's own, + 1 if more than k blocks back in the text

and a landmark is scored as if its block stood where it does, or k + 1 blocks back if it is older.

Cost: that of softmax attention; with `retrieve` n·(n / L + (k + 1)·L)·d multiply-adds a head for the
scores, and memory linear in n.
Reduces to softmax attention in one block.
Source: "Landmark Attention: Random-Access Infinite Context Length for Transformers" and its authors'
program. Landmarks are tokens of the text that carry nothing else, put there by `place_landmarks`.
Training takes no `retrieve`; the paper's models have `position="rope"`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn.functional import pad

from attlas import ops, queries
from attlas.attention import Attention
from attlas.bases.packing import place_heads
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.positions.base import ScoreMod
from attlas.supports import Supports
from attlas.tracing import any_length, stretches


@mechanism(
    "landmark-attention", example={"block": 3, "retrieve": 2},
    reduces_to=Reduction("softmax", {"block": 64, "retrieve": None}),
)  # fmt: skip
class Landmark(Attention):
    """Causal attention that enters earlier blocks through their landmarks."""

    supports = Supports(bidirectional=False, cross=False, counts=True)
    beyond: ClassVar[tuple[str, ...]] = (
        "position: where blocks are retrieved, keys are rotated by their place in a block",
        "score: there it tells how far off a block is said to stand",
    )

    block: int = option("L, tokens of a block, its landmark included", default=51, at_least=2)
    retrieve: int | None = option(
        "k, earlier blocks that a query enters; None: all of them, as in training", default=None,
        at_least=1,
    )  # fmt: skip

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """As ever; to retrieve blocks, keys by their place in a block, and queries not yet rotated."""
        if self.retrieve is None:
            return super().position(q, k, inputs)
        at = self.places(inputs)[:, -k.shape[2] :] % self.block
        return q, self.position_encoding.rotate(k, at)

    @property
    def score_mod(self) -> ScoreMod | None:
        """The position encoding's; where blocks are retrieved it is part of the score."""
        return super().score_mod if self.retrieve is None else None

    def places(self, inputs: Inputs) -> Integer[Tensor, "#batch all_keys"]:
        """The number of every token in its row, padding left out."""
        if inputs.valid is None:
            return torch.arange(inputs.key_positions.shape[-1], device=inputs.x.device)[None]
        return (inputs.valid.long().cumsum(-1) - 1).clamp(min=0)

    def both_places(self, inputs: Inputs, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """Places of the last queries [batch 1 queries 1] and keys [batch 1 1 keys]."""
        inputs.check_places(keys)
        at = self.places(inputs)[:, None, None, -keys:]
        return at[..., -queries:].mT, at

    def score(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Where blocks are retrieved, −∞ in those that are not and as of D blocks back in the others."""
        if self.retrieve is None:
            return super().score(q, k, inputs)
        size = self.block
        q_at, k_at = self.both_places(inputs, q.shape[2], k.shape[2])
        inside, own, back = k_at % size, k_at // size, q_at // size - k_at // size
        # One product for each distance that a block may be said to have.
        said = [
            self._said(ops.grouped_product(x * self.scale, k.mT), q_at % size + apart * size, inside)
            for apart, x in enumerate(self._turned(q, q_at[:, 0, :, 0] % size))
        ]
        scores = _picked(said, back.clamp(0, self.retrieve + 1))
        visible = inputs.visible(q, k)
        shown = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
        landmarks = shown.masked_fill((inside < size - 1) | (back < 1), -torch.inf)
        blocks = -(-k.shape[2] // size)
        own = own.expand_as(scores)
        best = landmarks.new_full((*scores.shape[:3], blocks), -torch.inf)
        best = best.scatter_reduce(-1, own, landmarks, "amax")
        apart = self._distances(best, q_at // size).gather(-1, own)
        chosen = _picked(said, apart.clamp(min=0))
        return chosen.masked_fill((apart < 0) & (back > 0), -torch.inf)

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """The grouped softmax, blocks being told by counting."""
        queries, keys = scores.shape[-2:]
        q_at, k_at = self.both_places(inputs, queries, keys)
        landmark = k_at % self.block == self.block - 1
        blocks = -(-keys // self.block)
        return grouped_softmax(scores, q_at // self.block, k_at // self.block, landmark, blocks)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """With retrieved blocks alone, where nothing but causality and padding hides pairs."""
        dropped = self.training and self.dropout > 0
        plain = inputs.runs_along(self.pattern) and not any_length(q.shape[2])
        if self.retrieve is None or dropped or not plain:
            return queries.in_blocks(self, q, k, v, inputs)
        size, keys = self.block, k.shape[2]
        inputs.check_places(keys)
        slots = -(-keys // size) * size
        if (valid := inputs.valid) is None:
            k, v = (pad(x, (0, 0, 0, slots - keys)) for x in (k, v))
        else:
            at = self.places(inputs).masked_fill(~valid, -1)[:, -keys:]
            k, v = (place_heads(x, at, slots) for x in (k, v))
        k, v = (x.unflatten(2, (-1, size)) for x in (k, v))
        at = self.places(inputs)[:, -q.shape[2] :].expand(len(q), -1)
        # What a query holds: its products with all landmarks, and a block of keys.
        wide = max(size * self.head_dim, k.shape[2] * (self.retrieve + 2))
        most = queries.CPU_BLOCK if q.device.type == "cpu" else queries.BLOCK
        rows = max(1, most // max(1, q.shape[0] * q.shape[1] * wide))
        return torch.cat([
            ops.recomputed(self._retrieved, q[:, :, some], k, v, at[:, some], when=q.shape[2] > 1)
            for some in stretches(q.shape[2], rows)
        ], dim=2)  # fmt: skip

    def _retrieved(
        self, q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch kv_heads blocks size width"],
        v: Float[Tensor, "batch kv_heads blocks size width"], at: Integer[Tensor, "batch queries"],
    ) -> Float[Tensor, "batch heads queries width"]:  # fmt: skip
        """Attention to a query's own block, and one after the other to those that it chooses."""
        size, blocks, count = self.block, k.shape[2], self.retrieve or 0
        inside, own = (at % size)[:, None, :, None], (at // size)[:, None, :, None]
        turned = self._turned(q, at % size)
        last, number = torch.full_like(inside, size - 1), torch.arange(blocks, device=q.device)
        said = [
            self._said(
                ops.grouped_product(x * self.scale, k[:, :, :, -1].mT), inside + apart * size, last
            )
            for apart, x in enumerate(turned)
        ]
        back = own - number
        landmarks = _picked(said, back.clamp(0, count + 1)).masked_fill(back < 1, -torch.inf)
        apart = self._distances(landmarks, own)
        # The chosen blocks' numbers; where there are fewer, a block that is not chosen.
        chosen = apart.topk(min(count, blocks), dim=-1).indices
        stack, offsets = torch.stack(turned, dim=3), torch.arange(size, device=q.device)
        parts: list[tuple[Tensor, Tensor]] = []
        for block in (own.expand(*q.shape[:3], 1), *chosen.split(1, dim=-1)):
            steps = apart.gather(-1, block).clamp(min=0)
            x = stack.take_along_dim(steps[..., None], dim=3)
            scores = ((x * self.scale) @ _gathered(k, block).mT)[..., 0, :]
            scores = self._said(scores, inside + steps * size, offsets)
            first = not parts
            hidden = (offsets == size - 1) | ((offsets > inside) if first else (offsets < 0))
            tokens = scores.masked_fill(hidden, -torch.inf)
            out = (ops.softmax(tokens)[..., None, :] @ _gathered(v, block))[..., 0, :]
            entered = scores[..., -1].masked_fill(steps[..., 0] == 0, -torch.inf)
            parts.append((out, tokens.logsumexp(-1) if first else entered))
        return ops.merge(parts)[0]

    def _turned(self, q: Tensor, inside: Integer[Tensor, "#batch queries"]) -> list[Tensor]:
        """Queries rotated for keys that stand so many blocks before theirs, from 0 to k + 1."""
        apart = range((self.retrieve or 0) + 2)
        return [self.position_encoding.rotate(q, inside + d * self.block) for d in apart]

    def _said(self, scores: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        """Scores changed by the position encoding, for queries and keys that stand there."""
        change = self.position_encoding.score_mod
        return scores if change is None else change(scores, *ops.indices(scores, 0)[:2], q_at, k_at)

    def _distances(
        self, landmarks: Float[Tensor, "batch heads queries blocks"],
        own: Integer[Tensor, "#batch 1 queries 1"],
    ) -> Integer[Tensor, "batch heads queries blocks"]:  # fmt: skip
        """D of the chosen blocks, 0 of the query's own and −1 of all others."""
        count, blocks = self.retrieve or 0, landmarks.shape[-1]
        number = torch.arange(blocks, device=landmarks.device)
        best = landmarks.detach().topk(min(count, blocks), dim=-1)
        chosen = torch.zeros_like(landmarks, dtype=torch.long)
        chosen = chosen.scatter(-1, best.indices, (best.values > -torch.inf).long())
        later = chosen.flip(-1).cumsum(-1).flip(-1) - chosen
        apart = 1 + later + (own - number > count)
        return torch.where(chosen > 0, apart, -1).where(own != number, 0)


def grouped_softmax(
    scores: Float[Tensor, "batch heads queries keys"], q_block: Integer[Tensor, "#batch 1 queries 1"],
    k_block: Integer[Tensor, "#batch 1 #queries keys"], landmark: Bool[Tensor, "#batch 1 1 keys"],
    blocks: int, own_landmark: bool = False,
) -> Float[Tensor, "batch heads queries keys"]:  # fmt: skip
    """Weights of scores whose hidden pairs are −∞.

    Args:
        scores: of all pairs.
        q_block: the number of each query's block.
        k_block: the number of each key's block.
        landmark: True at landmarks.
        blocks: how many there are.
        own_landmark: whether the landmark of a query's own block counts as any other token of it.
    """
    group, mine, earlier = k_block.expand_as(scores), q_block == k_block, k_block < q_block
    own = mine if own_landmark else mine & ~landmark
    tokens = scores.masked_fill(landmark | ~earlier, -torch.inf)
    none = scores.new_zeros(*scores.shape[:-1], blocks)
    most = (none - torch.inf).scatter_reduce(-1, group, tokens.detach(), "amax")
    most = most.masked_fill(most == -torch.inf, 0.0).gather(-1, group)
    sizes = (tokens - most).exp()
    totals = none.scatter_add(-1, group, sizes).gather(-1, group)
    # A landmark whose tokens are all hidden would take weight that reaches none.
    entered = own | (landmark & earlier & (totals > 0))
    shares = ops.softmax(scores.masked_fill(~entered, -torch.inf))
    through = none.scatter_add(-1, group, shares.masked_fill(own, 0.0)).gather(-1, group)
    return torch.where(own, shares, through * ops.divided(sizes, totals))


def place_landmarks(
    tokens: Integer[Tensor, "batch tokens"], landmark: int, block: int
) -> Integer[Tensor, "batch longer"]:
    """The tokens with a landmark behind every `block` − 1 of them.

    Raises:
        ValueError: a block that holds no token beside its landmark.
    """
    if block < 2:
        raise ValueError(f"block must be at least 2, got {block}")
    whole = tokens.shape[1] // (block - 1) * (block - 1)
    parts = rearrange(tokens[:, :whole], "b (n t) -> b n t", t=block - 1)
    placed = pad(parts, (0, 1), value=landmark).flatten(1)
    return torch.cat((placed, tokens[:, whole:]), dim=1)


def _picked(said: list[Tensor], which: Tensor) -> Tensor:
    """For each pair the one of several scores that `which` numbers."""
    found = said[0]
    for number, scores in enumerate(said[1:], start=1):
        found = torch.where(which == number, scores, found)
    return found


def _gathered(
    x: Float[Tensor, "batch kv_heads blocks size width"],
    block: Integer[Tensor, "batch heads queries 1"],
) -> Float[Tensor, "batch heads queries size width"]:
    """One block for each head and query."""
    heads, groups = block.shape[1], block.shape[1] // x.shape[1]
    row = torch.arange(len(x), device=x.device)[:, None, None]
    head = torch.arange(heads, device=x.device)[:, None] // groups
    return x[row, head, block[..., 0]]
