"""HyperAttention: alike queries and keys meet in blocks, the rest through keys drawn uniformly.

    y = merge(softmax attention within blocks of equal rank, the same to m drawn keys, lse + log n/m)
    causal:  y = each half causally, by recursion; the second half's queries to the first half's keys
                 without a mask, as above; the two merged by their log-sum-exp

Queries and keys are ranked by an angular hash in Gray code. Drawn keys of a query's own block do not
count twice. Causal runs of up to `min_length` tokens, and others of fewer queries, are exact.
What a query of a long causal run sees lies before it, but into which block it falls is decided by all
queries of its half; a step with a cache attends to all keys exactly.

Cost: n·(block + samples) pairs, times log n when causal; memory linear in n; weights take n².
Reduces to softmax attention where one block holds the sequence.
Source: "HyperAttention: Long-context Attention in Near-Linear Time" and its authors' code, for the Gray
code (a permutation under which neighbours may differ in more than one bit) and for drawing uniformly
with replacement. Its float32 and flash paths let drawn keys of the own block count twice; here, as in
its half-precision path, they do not. Blocks that are not full are not padded with zero keys here.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Generator, Tensor
from torch.nn.functional import pad

from attlas import ops
from attlas.bases.approximation import SampledAttention, seeded
from attlas.catalog.registry import Reduction, mechanism
from attlas.options import option


@mechanism("hyper-attention", aliases=("hyper",), reduces_to=Reduction(
    "softmax", {"block": 4096}, lambda layer, plain: plain.load_state_dict(layer.state_dict()),
), example={"block": 4, "samples": 6, "min_length": 8})  # fmt: skip
class HyperAttention(SampledAttention):
    """Attention in near-linear time, by sorted blocks and uniform samples."""

    #: Which pairs meet is decided by their blocks.
    changes = ("mask",)

    block: int = option("keys in a block", default=256, at_least=1)
    samples: int = option("keys drawn from all of them", default=256, at_least=1)
    min_length: int = option("tokens up to which attention is exact", default=4096, at_least=1)

    def estimate(
        self, q: Tensor, k: Tensor, v: Tensor, chances: Tensor | None = None, *,
        causal: bool = False, rng: Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(out, lse), by halves when causal."""
        n, rng = q.shape[2], seeded(self.seed) if rng is None else rng
        if n <= self.min_length - (not causal):
            return self.exactly(q, k, v, causal=causal)
        if not causal:
            return super().estimate(q, k, v, rng=rng)
        half = (n + 1) // 2
        halves = [_halves(x) for x in (q, k, v)]
        out, lse = self.estimate(*halves, causal=True, rng=rng)
        out = rearrange(out, "b (h two) t d -> b h (two t) d", two=2)[:, :, :n]
        lse = rearrange(lse, "b (h two) t -> b h (two t)", two=2)[:, :, :n]
        earlier = self.estimate(q[:, :, half:], k[:, :, :half], v[:, :, :half], rng=rng)
        below, below_lse = ops.merge([(out[:, :, half:], lse[:, :, half:]), earlier])
        out = torch.cat((out[:, :, :half], below), dim=2)
        return out, torch.cat((lse[:, :, :half], below_lse), dim=2)

    def counts(
        self, q: Tensor, k: Tensor, chances: Tensor | None = None, *, causal: bool = False,
        rng: Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """How often each pair counts, by halves when causal."""
        n, rng = q.shape[2], seeded(self.seed) if rng is None else rng
        if n <= self.min_length - (not causal):
            ones = q.new_ones(*q.shape[:3], k.shape[2])
            return ones.tril() if causal else ones
        if not causal:
            return super().counts(q, k, rng=rng)
        half = (n + 1) // 2
        inner = self.counts(_halves(q), _halves(k), causal=True, rng=rng)
        first, second = rearrange(inner, "b (h two) t s -> two b h t s", two=2)
        cross = self.counts(q[:, :, half:], k[:, :, :half], rng=rng)
        second = second[:, :, : n - half, : n - half]
        upper = torch.cat((first, torch.zeros_like(cross).transpose(-1, -2)), dim=-1)
        return torch.cat((upper, torch.cat((cross, second), dim=-1)), dim=-2)


def _halves(x: Tensor) -> Tensor:
    """The halves of each head side by side, as heads; an odd token more is zero."""
    return rearrange(pad(x, (0, 0, 0, x.shape[2] % 2)), "b h (two t) d -> b (h two) t d", two=2)
