"""What approximations of softmax attention by hashed blocks and sampled keys share.

    h(x)   = g(Σ_t 2^t [x·r_t > 0]),  g(i) = i ⊕ ⌊i/2⌋      an angular hash in Gray code
    block  = ⌊rank of h / size⌋                             of queries and of keys, equally many
    c_ij   = 1 in one's own block, else Σ_s [j_s = j] / (m P_j)        j_1 … j_m drawn by P
    y_i    = Σ_j c_ij e^(q_i·k_j/√d) v_j / Σ_j c_ij e^(q_i·k_j/√d)

E[c_ij] = 1, so that the sums above and below the line are unbiased. The directions r and all draws
follow from `seed`: the same call gives the same output. Rows of a padded batch are taken one by one,
each without its padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Generator, Tensor
from torch.nn.functional import pad

from attlas import masks, ops
from attlas.attention import Attention
from attlas.inputs import Inputs, MaskLike
from attlas.options import option
from attlas.supports import Supports


class Draws(NamedTuple):
    """Keys drawn for every query: their ranks in the order of the hashes, and log 1/(m P)."""

    ranks: Integer[Tensor, "batch heads samples"]
    log_weights: Float[Tensor, "batch heads samples"]


class SampledAttention(Attention):
    """Softmax attention that computes blocks of alike queries and keys, and samples the rest."""

    supports = Supports(
        masks="padding", queries="all",
        graph_breaks="draws come from a generator of its own, and padded rows are taken one by one",
        one_length="blocks are joined as the number of tokens asks, and padded rows by their own",
    )
    changes: ClassVar[tuple[str, ...]] = ("normalize", "aggregate")
    beyond: ClassVar[tuple[str, ...]] = (
        "normalize: a pair counts as often as it was drawn, over the chance of that",
        "aggregate: values are summed up over blocks and samples, never over all pairs",
    )

    block: int = option("keys in a block", at_least=1)
    samples: int = option("keys drawn from all of them", at_least=1)
    projections: int = option("directions of the hash", default=7, at_least=1)
    seed: int = option("seed of directions and draws", default=0)

    def setup(self) -> None:
        """The directions of the hash.

        Raises:
            ValueError: a position encoding that adds to scores.
        """
        super().setup()
        if self.score_mod is not None:
            raise ValueError("position: a bias on scores does not follow keys into their blocks")
        self.planes: Tensor
        shape = self.head_dim, self.projections
        self.hold("planes", lambda: torch.randn(*shape, generator=seeded(self.seed), dtype=torch.float32))

    def hash(
        self, x: Float[Tensor, "batch heads tokens width"]
    ) -> Integer[Tensor, "batch heads tokens"]:
        """Angular hashes in Gray code."""
        wide = torch.promote_types(x.dtype, torch.float32)
        bits = (x.detach().to(wide) @ self.planes.to(x.device, wide) > 0).long()
        number = (bits << torch.arange(bits.shape[-1], device=x.device)).sum(-1)
        return number ^ (number >> 1)

    def chances(self, q: Tensor, inputs: Inputs) -> Tensor | None:
        """Unnormalised sampling probabilities of keys for every query head, [batch, heads, keys]: the
        "share" that keys carry; None where all are alike."""
        shares = inputs.carried.get("share")
        return None if shares is None else ops.repeated(shares, q.shape[1])[..., 0]

    def draw(self, k: Tensor, chances: Tensor | None, rng: Generator) -> Draws:
        """Keys in the order of their hashes, drawn with replacement; the same in each sequence."""
        u = torch.rand(k.shape[1], self.samples, generator=rng, dtype=torch.float64).to(k.device)
        u = u.expand(k.shape[0], -1, -1).contiguous()
        if chances is None:
            chances = torch.ones_like(k[..., 0])
        p = chances.double() / chances.double().sum(-1, keepdim=True)
        ranks = torch.searchsorted(p.cumsum(-1), u, right=True).clamp(max=k.shape[2] - 1)
        return Draws(ranks, -(self.samples * p.gather(-1, ranks)).log())

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Scores of all pairs, plus the logarithm of how often the approximation counts each."""
        scores = super().score(q, k, inputs)
        if self._is_step(q, k):
            return scores
        chances, (q, k) = self.chances(q, inputs), self.features(q, k, inputs)
        k = ops.repeated(k, q.shape[1])
        counts = self._by_rows(
            torch.zeros_like(scores), inputs, lambda b, rows, keys: _columns(self.counts(
                q[b][:, :, rows], k[b][:, :, keys],
                None if chances is None else chances[b][:, :, keys], causal=self._causal(inputs),
            ).to(scores.dtype), keys, k.shape[2]),
        )  # fmt: skip
        return scores + counts.log()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Blocks and samples; all keys exactly where a cache holds earlier ones."""
        if self._is_step(q, k):
            return self.fused(*self.features(q, k, inputs), v, inputs)
        if self.training and self.dropout:
            return self.aggregate(self.weigh(q, k, inputs), v, inputs)
        chances, (q, k) = self.chances(q, inputs), self.features(q, k, inputs)
        k, v = ops.repeated(k, q.shape[1]), ops.repeated(v, q.shape[1])
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        return self._by_rows(
            out, inputs, lambda b, rows, keys: self.estimate(
                q[b][:, :, rows], k[b][:, :, keys], v[b][:, :, keys],
                None if chances is None else chances[b][:, :, keys], causal=self._causal(inputs),
            )[0],
        )  # fmt: skip

    def estimate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chances: Tensor | None = None,
        *,
        causal: bool = False,
        rng: Generator | None = None,
    ) -> tuple[Float[Tensor, "batch heads queries width"], Float[Tensor, "batch heads queries"]]:
        """(out, lse) of the approximation, one key for every query head."""
        rng = seeded(self.seed) if rng is None else rng
        if k.shape[2] <= self.block:
            return self.exactly(q, k, v)
        q_order, k_order, size, blocks = self.order(q, k)
        back = q_order.argsort(-1)
        q, k, v = _taken(q, q_order), _taken(k, k_order), _taken(v, k_order)
        if chances is not None:
            chances = chances.gather(2, k_order)
        draws = self.draw(k, chances, rng)
        q = _folded(pad(q, (0, 0, 0, blocks * size - q.shape[2])), size)
        parts = [self.near(q, k, v, blocks), self.far(q, k, v, draws, blocks)]
        out, lse = ops.merge(parts)
        out = rearrange(out, "b (h n) s d -> b h (n s) d", n=blocks)
        lse = rearrange(lse, "b (h n) s -> b h (n s)", n=blocks)
        return _taken(out, back), lse.gather(2, back)

    def exactly(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of all pairs."""
        mask = masks.causal if causal else None
        return ops.attend(q, k, v, scale=self.scale, mask=mask, return_lse=True)

    def order(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Queries and keys in the order of their hashes, queries in a block, and blocks."""
        blocks = -(-k.shape[2] // self.block)
        q_order, k_order = (self.hash(x).argsort(dim=-1, stable=True) for x in (q, k))
        return q_order, k_order, -(-q.shape[2] // blocks), blocks

    def near(self, q: Tensor, k: Tensor, v: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """(out, lse) of every block of queries [batch, heads · blocks, size, width] with its keys."""
        short, mask = blocks * self.block - k.shape[2], None
        if short:
            k, v = pad(k, (0, 0, 0, short)), pad(v, (0, 0, 0, short))
            at = torch.arange(k.shape[2], device=k.device).view(blocks, 1, self.block)
            mask = (at < k.shape[2] - short).repeat(q.shape[1] // blocks, 1, 1)
            mask = mask.expand(1, -1, q.shape[2], -1)
        k, v = _folded(k, self.block), _folded(v, self.block)
        return ops.attend(q, k, v, scale=self.scale, mask=mask, return_lse=True)

    def far(
        self, q: Tensor, k: Tensor, v: Tensor, draws: Draws, blocks: int
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of every block of queries with the keys drawn from other blocks."""
        largest = draws.log_weights.amax(-1, keepdim=True)
        bias = (draws.log_weights - largest).to(q.dtype).repeat_interleave(blocks, dim=1)
        out, lse = ops.attend(
            q, _taken(k, draws.ranks), _taken(v, draws.ranks), scale=self.scale,
            mask=self.elsewhere(draws.ranks, blocks).expand(-1, -1, q.shape[2], -1), return_lse=True,
            score_mod=lambda score, b, h, q_idx, kv_idx: score + bias[b, h, kv_idx],
        )  # fmt: skip
        return out, lse + largest.to(lse.dtype).repeat_interleave(blocks, dim=1)

    def elsewhere(self, ranks: Tensor, blocks: int) -> Tensor:
        """Which keys drawn are in other blocks [batch, heads · blocks, 1, samples]."""
        each = torch.arange(blocks, device=ranks.device)[:, None]
        return (ranks[:, :, None] // self.block != each).flatten(1, 2)[:, :, None]

    def counts(
        self,
        q: Tensor,
        k: Tensor,
        chances: Tensor | None = None,
        *,
        causal: bool = False,
        rng: Generator | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """How often each pair counts: 1 in a block, 1/(m P) for every time that it is drawn."""
        rng = seeded(self.seed) if rng is None else rng
        if k.shape[2] <= self.block:
            return q.new_ones(*q.shape[:3], k.shape[2])
        q_order, k_order, size, _ = self.order(q, k)
        if chances is not None:
            chances = chances.gather(2, k_order)
        ranks, log_weights = self.draw(_taken(k, k_order), chances, rng)
        drawn = torch.zeros_like(k[..., 0], dtype=torch.float64)
        drawn = drawn.scatter_add(2, ranks, log_weights.exp().double())
        q_rank, k_rank = q_order.argsort(-1), k_order.argsort(-1)
        own = (q_rank // size)[..., None] == (k_rank // self.block)[:, :, None]
        return drawn.gather(2, k_rank)[:, :, None].masked_fill(own, 1.0).to(q.dtype)

    @torch.no_grad()
    def error(
        self,
        x: Float[Tensor, "batch queries dim"],
        context: Float[Tensor, "batch keys dim"] | None = None,
        *,
        mask: MaskLike | None = None,
        norm: Literal["fro", 2] = "fro",
    ) -> Float[Tensor, "batch heads"]:
        """Error of each head relative to exact attention, in the Frobenius or the spectral norm."""
        q, k, v, inputs = self.prepare(x, context, mask)
        exact = self.fused(*self.features(q, k, inputs), v, inputs)
        if inputs.valid is not None and context is None:
            exact = exact.masked_fill(~inputs.valid[:, None, :, None], 0.0)
        off = self.attend(q, k, v, inputs) - exact
        off, exact = off.float(), exact.float()
        size: Tensor = torch.linalg.matrix_norm(exact, ord=norm)
        relative: Tensor = torch.linalg.matrix_norm(off, ord=norm) / size
        return relative

    def _causal(self, inputs: Inputs) -> bool:
        return self.causal or inputs.mask == masks.causal

    def _is_step(self, q: Tensor, k: Tensor) -> bool:
        return self.causal and q.shape[2] != k.shape[2]

    def _by_rows(
        self, empty: Tensor, inputs: Inputs, result: Callable[[slice, Any, Any], Tensor]
    ) -> Tensor:
        """`result` of all sequences at once, or of each without its padding, put into zeros."""
        every = slice(None)
        if inputs.valid is None or not len(empty):
            return result(every, every, every)
        return torch.stack([row[0] for row in self._rows(empty, inputs.valid, result, inputs)])

    def _rows(
        self,
        empty: Tensor,
        valid: Tensor,
        result: Callable[[slice, Any, Any], Tensor],
        inputs: Inputs,
    ) -> Iterator[Tensor]:
        for b, keys in enumerate(valid):
            row, keys = slice(b, b + 1), keys.nonzero()[:, 0]
            if not len(keys):
                yield empty[row]
            elif inputs.context is not None:
                yield result(row, slice(None), keys)
            else:
                yield empty[row].index_copy(2, keys, result(row, keys, keys))


def seeded(seed: int) -> Generator:
    """A generator that gives the same draws for the same seed."""
    return Generator().manual_seed(seed)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of each head in another order [batch, heads, order, width]."""
    return x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1]))


def _folded(x: Tensor, size: int) -> Tensor:
    """Blocks of tokens, as heads."""
    return rearrange(x, "b h (n s) d -> b (h n) s d", s=size)


def _columns(x: Tensor, at: Tensor | slice, width: int) -> Tensor:
    """Columns of a wider matrix of zeros."""
    return x if isinstance(at, slice) else x.new_zeros(*x.shape[:-1], width).index_copy(-1, at, x)
