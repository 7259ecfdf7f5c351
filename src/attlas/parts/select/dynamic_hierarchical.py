"""DHSA: a prompt is cut where its keys turn, and chunks of unequal length stand for their tokens.

    boundaries   positions whose logit b(k) is above `threshold`, of those no other within `apart` being
                 higher, the best ⌊n / block⌋ · per_block
    q̄_c, k̄_c     mean over chunk c, and over all heads, times √(tokens of c)
    S_tj         = q̄_c(t) · k̄_c(j)
    read(t)      = the first and the most recent tokens, and those of largest S_tj, `budget` in all
    b(k)         two windows of w keys, left and right of a position, all key heads side by side, attend
                 to each other; with l, r the means of both, an MLP of [l, r, |l − r|, l ∘ r, cos(l, r)]

The √ keeps a chunk's score of unrelated tokens as wide for long chunks as for short ones. All heads of a
layer read the same tokens; of tokens with equal scores the earlier are read. The last queries of a prompt
(`dense`) read everything, and so does decoding.

`attlas calibrate` trains one b for all layers, on keys of texts and what their attention says: with
a(i, …) the attention, in the mean over heads, that queries from i + w on pay to some keys,

    ratio_i = max(a(i, i−w+1…i), a(i, i+1…i+w)) / min(of both),        i is a boundary if ratio_i ≥ 2

by a binary cross-entropy with weights (1 − p)², positives 1.3 times.

Cost: chunks²·d for the scores, n · chunks numbers for who reads what, n · budget pairs instead of n²/2.
Reduces to full attention where `budget` is the whole prompt.
Source: "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs", and its
authors' program for b, its training and the defaults. The program cuts queries in equal blocks, here they
have the keys' chunks; it puts the first tokens in the place of the earliest that were chosen, here they
are part of the budget. It leaves decoding dense. It trains on 10^5 documents with a rate of 1e-4; here
`calibrate` decides the texts, so that the rate is higher and they are read several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn
from torch.nn.functional import max_pool1d, pad

from attlas import masks
from attlas.attach import attach
from attlas.attach.thinned import Text, Thinned
from attlas.cache.boundaries import WINDOW, Boundaries, Gathered, trained, windows
from attlas.calibration import Calibrated
from attlas.calibration.run import Tick
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.masks import Mask
from attlas.masks.algebra import Reach
from attlas.masks.patterns import ByTensor
from attlas.options import option
from attlas.tracing import stretches

#: Positions that are judged at once.
ROWS = 2048
#: Queries and keys of the blocks in which what is read is listed.
SIZE = (64, 32)


@mechanism(
    "dynamic-hierarchical-sparse-attention", aliases=("dhsa",),
    example={"budget": 6, "first": 1, "recent": 2, "dense": 2, "block": 8, "threshold": -9.0},
)  # fmt: skip
class DynamicHierarchical(Calibrated, Thinned):
    """Let every token of a prompt attend to those in the chunks that fit its own best."""

    everything: ClassVar[dict[str, Any]] = {"budget": 10**6}

    budget: int | float = option(
        "tokens that a query reads: a share of the prompt, as 0.25, or a number", default=2048, above=0
    )
    first: int = option("first tokens that all read", default=128, at_least=0)
    recent: int = option("newest tokens that each reads, itself included", default=128, at_least=0)
    dense: int = option("last queries that read everything", default=64, at_least=0)
    block: int = option("tokens for which there may be `per_block` chunks", default=128, at_least=1)
    per_block: int = option("chunks for each `block` tokens", default=8, at_least=1)
    threshold: float = option("logit that boundaries are above", default=1.1)
    apart: int = option("positions beside a boundary that are none", default=8, at_least=0)

    def setup(self) -> None:
        """Refuse a share above the whole, and a number with no room for what is always read."""
        super().setup()
        whole = not isinstance(self.budget, float)
        if not whole and self.budget > 1:
            raise UserError(f"budget must be a share in (0, 1] or a whole number, got {self.budget}")
        if whole and self.budget < max(1, self.first + self.recent):
            raise UserError(
                f"budget={self.budget} has no room for first={self.first} and recent={self.recent}"
            )
        self.predictor: Boundaries | None = None

    def fit(
        self, model: nn.Module, texts: Sequence[Tensor], tick: Tick, partial: Path | None
    ) -> dict[str, Tensor]:
        """The weights of b, the same whenever it is trained on the same texts."""
        gathered, device = Gathered(), next(model.parameters()).device
        with torch.no_grad(), attach(model, gathered):
            for number, text in enumerate(texts):
                model(text.to(device), use_cache=False, logits_to_keep=1)
                tick(number + 1, len(texts))
        return trained(torch.cat(gathered.windows), torch.cat(gathered.told))

    def check(self, model: nn.Module) -> None:
        """Make b of what calibration found."""
        super().check(model)
        device = next(model.parameters()).device
        width = self.statistics["norm.weight"].shape[0]
        with torch.device("meta"):  # where no number is drawn
            made = Boundaries(width)
        made.load_state_dict(self.statistics, assign=True)
        self.predictor = made.to(device).eval().requires_grad_(False)

    def pattern(self, text: Text) -> Mask:
        """Lists of the blocks that hold what is read, and the pairs in them."""
        return self.read(text, torch.stack([self.ends(k) for k in text.k]))

    def ends(self, k: Float[Tensor, "kv_heads keys dim"]) -> Bool[Tensor, " keys"]:
        """Whether a chunk ends with each key."""
        assert self.predictor is not None
        flat, keys = k.transpose(0, 1).flatten(1).float(), k.shape[1]
        at = torch.arange(keys, device=k.device)
        with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
            logits = torch.cat([
                self.predictor(windows(flat, at[rows])) for rows in stretches(keys, ROWS)
            ])  # fmt: skip
        inside = (at >= WINDOW - 1) & (at < keys - WINDOW) & (logits > self.threshold)
        ends = peaks(logits.masked_fill(~inside, -torch.inf), self.apart)
        best = logits.masked_fill(~ends, -torch.inf).argsort(descending=True, stable=True)
        ends[best[keys // self.block * self.per_block :]] = False
        # The queries that read everything have chunks of their own.
        return ends | (at == keys - 1) | (at == keys - 1 - self.dense)

    def read(self, text: Text, ends: Bool[Tensor, "batch keys"]) -> Mask:
        """What each query reads of chunks that end where `ends` says."""
        keys, rows = text.k.shape[2], len(ends)
        found = [self.taken(text.q[row], text.k[row], ends[row]) for row in range(rows)]
        count = max(low.shape[0] for low, _ in found)
        low = torch.stack([pad(x, (0, count - x.shape[0]), value=keys) for x, _ in found])
        taken = torch.stack([pad(x, (0, count - x.shape[1])) for _, x in found])
        inside: Mask = Taken(taken, low, ends.cumsum(-1) - ends.long(), text.offset)
        for size, pattern in ((self.first, masks.sinks), (self.recent, masks.window)):
            inside = inside | pattern(size) if size else inside
        if self.dense >= keys:
            return masks.full
        if self.dense:
            inside = inside | ~masks.sinks(keys - self.dense).T
        return masks.Pages(self.lists(taken, low, text), SIZE, first=text.offset) & inside

    def taken(
        self, q: Float[Tensor, "heads queries dim"], k: Float[Tensor, "kv_heads keys dim"],
        ends: Bool[Tensor, " keys"],
    ) -> tuple[Int[Tensor, " chunks"], Int[Tensor, "queries chunks"]]:  # fmt: skip
        """(the first token of each chunk that is there to be taken, how many every query takes)."""
        keys, offset = k.shape[1], k.shape[1] - q.shape[1]
        stops = ends.nonzero()[:, 0] + 1
        starts = pad(stops[:-1], (1, 0))
        own = torch.searchsorted(stops, torch.arange(offset, keys, device=k.device), right=True)
        mine = pooled(q.mean(0), (starts - offset).clamp(min=0), (stops - offset).clamp(min=0))
        scores = mine @ pooled(k.mean(0), starts, stops).mT
        order = scores.argsort(dim=-1, descending=True, stable=True)[own]
        at = torch.arange(offset + 1, keys + 1, device=k.device)[:, None]
        low = starts.clamp(min=self.first)
        # Of each chunk, the tokens that are neither among the first nor recent to the query.
        free = (torch.minimum(stops, at - self.recent) - low).clamp(min=0).gather(1, order)
        always = at.clamp(max=self.first) + (at - self.first).clamp(min=0, max=self.recent)
        budget = max(1, round(self.budget * keys)) if isinstance(self.budget, float) else self.budget
        left = (budget - always).clamp(min=0) - (free.cumsum(1) - free)
        taken = torch.minimum(free, left.clamp(min=0))
        return low, torch.zeros_like(taken).scatter(1, order, taken).int()

    def lists(
        self, taken: Int[Tensor, "batch queries chunks"], low: Int[Tensor, "batch chunks"], text: Text
    ) -> Int[Tensor, "batch 1 q_blocks count"]:
        """The blocks of keys that each block of queries reads something of."""
        rows, columns = SIZE
        keys, queries = text.k.shape[2], taken.shape[1]
        most = pad(taken, (0, 0, 0, -queries % rows)).unflatten(1, (-1, rows)).amax(2)
        there, blocks = most > 0, -(-keys // columns)
        begin = torch.where(there, low[:, None] // columns, blocks)
        end = torch.where(there, (low[:, None] + most - 1) // columns + 1, blocks)
        steps = most.new_zeros(*most.shape[:2], blocks + 1)
        one = torch.ones_like(begin, dtype=steps.dtype)
        steps = steps.scatter_add(2, begin.long(), one).scatter_add(2, end.long(), -one)
        begins = text.offset + rows * torch.arange(most.shape[1], device=taken.device)[:, None]
        last = (begins + rows).clamp(max=keys) - 1
        block = torch.arange(blocks, device=taken.device)
        always = (block * columns < self.first) | (last >= keys - self.dense)
        if self.recent:
            always = always | (block >= (begins - self.recent + 1).clamp(min=0) // columns)
        listed = ((steps.cumsum(2)[..., :blocks] > 0) | always) & (block <= last // columns)
        order = torch.where(listed, block, blocks).sort(dim=-1).values
        order = order[..., : max(1, int(listed.sum(-1).max()))]
        return order.masked_fill(order == blocks, -1).int()[:, None]


class Taken(ByTensor):
    """The pairs of queries and the first tokens of chunks, as many as they take.

    Args:
        taken: how many tokens of each chunk every query takes.
        low: the first token of each chunk that is there to be taken.
        chunk: that of each key.
        first: position of the first query.
    """

    def __init__(
        self, taken: Int[Tensor, "batch queries chunks"], low: Int[Tensor, "batch chunks"],
        chunk: Integer[Tensor, "batch keys"], first: int,
    ) -> None:  # fmt: skip
        super().__init__(taken, fixed=True)
        self.low, self.chunk, self.first = low, chunk, first
        self.batch = len(taken) if len(taken) > 1 else None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """None that anybody fills anew."""
        return ()

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether k is among the first that q takes of its chunk."""
        taken, low, chunk = (x.to(k.device) for x in (self.held, self.low, self.chunk))
        row = b if self.batch is not None else torch.zeros_like(b)
        at, query = k.clamp(max=chunk.shape[1] - 1), (q - self.first).clamp(0, taken.shape[1] - 1)
        own = chunk[row, at]
        inside = at - low[row, own]
        return (inside >= 0) & (inside < taken[row, query, own])

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        """Any pair may be there: the lists beside it know better."""
        some = (q_lo == q_lo) & (k_lo == k_lo)
        return some, ~some

    def __repr__(self) -> str:
        return f"taken({tuple(self.held.shape)})"


def pooled(
    x: Float[Tensor, "tokens dim"], starts: Int[Tensor, " chunks"], stops: Int[Tensor, " chunks"]
) -> Float[Tensor, "chunks dim"]:
    """The mean of each chunk's tokens times the root of their number; 0 of an empty one."""
    sums = pad(x.double().cumsum(0), (0, 0, 1, 0))
    size = (stops - starts).clamp(min=1)[:, None]
    return ((sums[stops] - sums[starts]) / size.sqrt()).to(torch.promote_types(x.dtype, torch.float32))


def peaks(logits: Float[Tensor, " tokens"], apart: int) -> Bool[Tensor, " tokens"]:
    """The positions that are taken when, from the highest on, each rules out those so near to it; where
    it is −∞, none."""
    left, found = logits.clone(), torch.zeros_like(logits, dtype=torch.bool)
    # Equal logits are decided for the earlier position.
    rank = torch.empty_like(logits).scatter(
        0, logits.argsort(descending=True, stable=True),
        -torch.arange(len(logits), dtype=logits.dtype, device=logits.device),
    )  # fmt: skip
    left = rank.masked_fill(logits == -torch.inf, -torch.inf)
    while bool((left > -torch.inf).any()):
        near = max_pool1d(left[None], 2 * apart + 1, 1, apart)[0]
        new = (left == near) & (left > -torch.inf)
        found |= new
        gone = max_pool1d(new.to(left.dtype)[None], 2 * apart + 1, 1, apart)[0] > 0
        left = left.masked_fill(gone, -torch.inf)
    return found
