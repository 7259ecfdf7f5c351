"""Mixture of sparse attention (MoSA): every sparse head chooses the tokens that it attends among.

    r    = σ(x W_r)                                  one number for each token and sparse head
    S_h  = the k tokens with the largest r_h,        k = max(2, ⌊n / sparsity⌋)
    y_t  = Σ_{h dense} head_h(x)_t W_O^h + Σ_{h: t ∈ S_h} r_{t,h} head_h(x[S_h])_t W_O^h

Tokens of S_h alone are projected and meet each other, causally and rotated by their places in the text;
a token that no head chooses gets what the dense heads give it. The first `dense_heads` heads are plain.

A head chooses over the whole text, the tokens after a token too: with causal pairs whether an earlier
token is chosen still rests on later ones. Behind a cache a head chooses among the tokens so far, so that
decoding gives what the last token of a whole pass over these would get.

Cost: 4 k·dim·d multiply-adds for the projections of a sparse head and 2 k²·d for its pairs, of n and n²
in a dense one. Memory linear in n. A cache keeps keys of all tokens, which may be chosen later.
Reduces to multi-head attention with r = 1 and sparsity = 1, or where all heads are dense.
Source: "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing"
and its authors' program, which has the initialisation, the half of the channels that are rotated and
the two tokens at least. A cache is not theirs. That more sparse heads do better at equal cost was not
seen here: 14 of sparsity 8 for one of four dense ones, 1200 steps of a small model on Shakespeare at 128
characters, gave losses 0.2 and 1.3 % higher (two seeds).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas import masks, ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.masks.algebra import Reach
from attlas.ops.reference import taken
from attlas.options import option
from attlas.positions import RoPE
from attlas.supports import Supports

CHOICE = "heads choose among the tokens of a whole pass, those to come too"


def _all_dense(layer: Attention, plain: Attention) -> None:
    plain.load_state_dict(layer.state_dict(), strict=False)


@mechanism(
    "mosa", aliases=("mixture-of-sparse-attention",), example={"sparsity": 2},
    reduces_to=Reduction("softmax", {"dense_heads": 2, "rotate_fraction": 0.0}, _all_dense),
)  # fmt: skip
class MoSA(Attention):
    """A few dense heads, and many that attend among few tokens of their own choice."""

    supports = Supports(cross=False, position=False, queries="all")
    changes = ("project", "mask", "output")
    beyond: ClassVar[tuple[str, ...]] = ("position: a share of each head's channels is rotated",)
    roomy: ClassVar[bool] = False  # hidden keys could be chosen
    expected_failures: ClassVar[dict[str, str]] = dict.fromkeys(
        ("causality", "decoding", "decoding-padded", "static-cache", "beams", "told-while-decoding"),
        CHOICE,
    )  # fmt: skip

    dense_heads: int = option(
        "heads that see all tokens, the first; half of them and at most four unless given", at_least=0,
        factory=lambda layer: min(4, layer.heads // 2),
    )  # fmt: skip
    sparsity: int = option("of so many tokens a sparse head chooses one", default=16, at_least=1)
    include_first: bool = option("whether every head chooses the first token", default=False)
    rotate_fraction: float = option(
        "share of a head's channels that are rotated", default=0.5, at_least=0, at_most=1
    )
    rope_base: float = option("of the wavelengths", default=10000.0, above=0)

    def setup(self) -> None:
        """The router, and the rotation of a part of the channels."""
        super().setup()
        if self.kv_heads != self.heads:
            raise ValueError(
                f"kv_heads must be heads={self.heads}, as each head chooses its own tokens; got "
                f"{self.kv_heads}"
            )
        self.sparse_heads = self.heads - self.dense_heads
        if self.sparse_heads < 0:
            raise ValueError(f"dense_heads must be 0 to heads={self.heads}, got {self.dense_heads}")
        if self.sparse_heads:
            self.router = nn.Linear(self.dim, self.sparse_heads, bias=False)
        self.rotated = int(self.rotate_fraction * self.head_dim) // 2 * 2
        if self.rotated:
            self.rotary = RoPE(self.rotated, self.rope_base)

    def make_projections(self) -> None:
        """Sparse heads start in the bounds of the authors' program."""
        super().make_projections()
        own = (self.heads - self.dense_heads) * self.head_dim
        if own <= 0:
            return
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            bound = (3 * self.head_dim) ** -0.5
            nn.init.uniform_(projection.weight[-own:].detach(), -bound, bound)
        bound = (self.dim * own // self.head_dim) ** -0.5
        nn.init.uniform_(self.o_proj.weight[:, -own:].detach(), -bound, bound)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Dense heads of all tokens, sparse ones of those that they choose; of all for a cache."""
        if not self.sparse_heads:
            return super().project(inputs)
        scores = self.router(inputs.x).transpose(1, 2)
        # Caches hold them beside the keys, of which dense heads have some that nobody asks.
        unasked = scores.new_zeros(len(scores), self.dense_heads, scores.shape[2])
        inputs.carry("router", torch.cat((unasked, scores), dim=1)[..., None])
        if inputs.cache is not None:
            return super().project(inputs)
        at, _ = self.choice(inputs)
        rows = torch.arange(len(at), device=at.device)[:, None, None]
        chosen = inputs.x[rows, at]
        three = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (self._by_head(projection, inputs.x, chosen, at) for projection in three)
        return q, k, v

    def _by_head(self, projection: nn.Linear, x: Tensor, chosen: Tensor, at: Tensor) -> Tensor:
        """Each head's vectors, 0 at tokens that it does not choose."""
        edge = self.dense_heads * self.head_dim
        dense, sparse = projection.weight.split([edge, self.sparse_heads * self.head_dim])
        own = chosen @ sparse.unflatten(0, (self.sparse_heads, -1)).transpose(1, 2)
        plain = x @ dense.T
        if projection.bias is not None:
            plain = plain + projection.bias[:edge]
            own = own + projection.bias[edge:].unflatten(0, (self.sparse_heads, 1, -1))
        return torch.cat((self.split_heads(plain), spread(own, at, x.shape[1])), dim=1)

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The first channels rotated by the tokens' places."""
        if not self.rotated:
            return q, k
        sizes = [self.rotated, self.head_dim - self.rotated]
        (q, q_rest), (k, k_rest) = q.split(sizes, dim=-1), k.split(sizes, dim=-1)
        q, k = self.rotary.rotate_both(q, k, inputs.positions, inputs.token_positions)
        return torch.cat((q, q_rest), dim=-1), torch.cat((k, k_rest), dim=-1)

    def choice(
        self, inputs: Inputs
    ) -> tuple[Int[Tensor, "batch heads k"], Bool[Tensor, "batch heads k"]]:
        """The tokens that each sparse head chooses of all keys so far, in their order; and which of them
        count: in rows that padding makes shorter the last do not."""
        scores = inputs.carried["router"][:, self.dense_heads :, :, 0].detach()
        tokens = scores.shape[2]
        valid = None if inputs.valid is None else inputs.valid[:, -tokens:]
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], -torch.inf)
        if self.include_first:
            begins = torch.arange(tokens, device=scores.device) == 0
            if valid is not None:
                begins = valid & (valid.cumsum(-1) == 1)
            scores = scores.masked_fill(begins.expand(len(scores), -1)[:, None], torch.inf)
        k = min(max(tokens // self.sparsity, 2), tokens)
        at = scores.topk(k, dim=-1).indices
        if valid is None:
            return at.sort(-1).values, torch.ones_like(at, dtype=torch.bool)
        count = valid.sum(-1)
        own = torch.minimum((count // self.sparsity).clamp(min=2), count)
        counts = (torch.arange(k, device=at.device) < own[:, None, None]).expand_as(at)
        order = at.masked_fill(~counts, tokens).argsort(-1)
        return at.gather(-1, order), counts

    def mask(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Mask | Bool[Tensor, "b h queries keys"] | None:
        """A sparse head's chosen tokens among each other."""
        seen = super().mask(q, k, inputs)
        if not self.sparse_heads:
            return seen
        at, counts = self.choice(inputs)
        inputs.notes["chosen"], inputs.notes["counts"] = at, counts
        none = torch.zeros(*at.shape[:2], k.shape[2], dtype=torch.bool, device=at.device)
        sparse = none.scatter(-1, at, counts)
        dense = torch.ones_like(sparse[:, :1]).expand(-1, self.dense_heads, -1)
        chosen = torch.cat((dense, sparse), dim=1)
        if isinstance(seen, Tensor):
            return seen & chosen[:, :, None] & chosen[:, :, -q.shape[2] :, None]
        return masks.both(seen, Chosen(chosen))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Dense heads as ever; sparse ones over the tokens that they choose alone."""
        seen, edge, tokens = Attention.mask(self, q, k, inputs), self.dense_heads, k.shape[2]
        plain = (self.pattern if inputs.valid is not None else seen) in (None, masks.causal)
        if not self.sparse_heads or not plain or q.shape[2] != tokens:
            return super().attend(q, k, v, inputs)
        at, counts = inputs.notes["chosen"], inputs.notes["counts"]
        # Causally, those that do not count stand behind all that do.
        rows = None if inputs.valid is None else counts[:, :, None]
        pairs = masks.causal if masks.causal in (self.pattern, seen) else rows
        dropout = self.dropout if self.training else 0.0
        own = ops.attend(
            *(taken(x[:, edge:], at) for x in (q, k, v)), mask=pairs, scale=self.scale, dropout=dropout
        )
        sparse = spread(own.masked_fill(~counts[..., None], 0.0), at, tokens)
        if not edge:
            return sparse
        dense = ops.attend(
            q[:, :edge], k[:, :edge], v[:, :edge], mask=seen, scale=self.scale, dropout=dropout
        )
        return torch.cat((dense, sparse), dim=1)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Sparse heads scaled by the router, then all joined and projected."""
        if self.sparse_heads:
            r = inputs.carried["router"][:, self.dense_heads :, -heads.shape[2] :].sigmoid()
            dense, sparse = heads.split([self.dense_heads, self.sparse_heads], dim=1)
            heads = torch.cat((dense, sparse * r), dim=1)
        return super().output(heads, inputs)


class Chosen(Mask):
    """Each head's chosen tokens among each other.

    Args:
        chosen: True at them.
    """

    def __init__(self, chosen: Bool[Tensor, "batch heads tokens"]) -> None:
        self.chosen, (self.batch, self.heads) = chosen, chosen.shape[:2]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Boolean tensor over the broadcast of the index tensors."""
        chosen = self.chosen.to(k.device)
        return chosen[b, h, q] & chosen[b, h, k]

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        """(some, every): which tokens of a block are chosen is only looked up pair by pair."""
        some = (k_lo == k_lo) & (q_lo == q_lo)
        return some, some & False


def spread(
    x: Float[Tensor, "batch heads k width"], at: Int[Tensor, "batch heads k"], tokens: int
) -> Float[Tensor, "batch heads tokens width"]:
    """Rows of x at their tokens, 0 elsewhere."""
    empty = x.new_zeros(*x.shape[:2], tokens, x.shape[3])
    return empty.scatter(2, at[..., None].expand_as(x), x)
