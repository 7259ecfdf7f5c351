"""Native sparse attention (NSA): blocks compressed to one token each, the best blocks whole, a window.

    k̄_i, v̄_i = φ_k(k_{id}, …, k_{id+l−1}), φ_v(v_{id}, …, v_{id+l−1})        φ: an MLP, or the mean
    p_t      = softmax_i(q_t·k̄_i / √d_k)                          over blocks that end at t or before
    p'_tj    = Σ_{heads of a group} Σ_{strides s of j} Σ_{i that hold s} p_ti
    read(t)  = the `topk` blocks j of largest p'_tj; the first ones and the own and those before it always
    out_t    = g¹_t Σ_i p_ti v̄_i + g²_t Attn(q_t, tokens of read(t)) + g³_t Attn(q_t, last w tokens)

Compressed blocks hold l tokens, one every d; selected ones, of l' tokens, are wholes of such strides. The
query heads of a group choose together, so that they read the same. g = σ(x W_g + b), one for each head
and branch. All three see the same keys and values, as in published programs; the paper has them apart.
`compression="mlp"` adds a trained vector to each place of a block, then takes Linear, ReLU, Linear.

Cost: n²/d products for the choice, n·(topk·l' + w) pairs instead of n²/2; memory linear in n. A cache
also keeps the compressed tokens, 1/d of its size.
Reduces to causal softmax attention by g = (0, 1, 0) where `topk` is the number of blocks.
Source: "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention", of which
"Optimizing Native Sparse Attention with Latent Attention and Local Global Alternating Strategies" is a
rearrangement.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from attlas import ops
from attlas.attention import Attention
from attlas.bases.blocks import Blocks
from attlas.bases.chosen import Chosen, dense_of
from attlas.bases.compression import Compression, aligned
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports
from attlas.tracing import stretches, traced

#: Queries that meet the compressed blocks at once.
ROWS = 256


def _choose_alone(native: NativeSparse, plain: Attention) -> None:
    native.gate_proj.weight.zero_()
    native.gate_proj.bias.copy_(torch.tensor([-torch.inf, torch.inf, -torch.inf]).repeat(native.heads))
    plain.load_state_dict({name: native.state_dict()[name] for name in plain.state_dict()})


@mechanism(
    "native-sparse-attention", paper="alternating-sparse-attention", aliases=("nsa",),
    example={"block": 4, "stride": 2, "selected": 4, "topk": 3, "recent": 1, "window": 3, "hidden": 4},
    reduces_to=Reduction("softmax", {"topk": 64}, _choose_alone),
)  # fmt: skip
class NativeSparse(Chosen):
    """Causal attention by compression, selection and a window, gated and summed."""

    supports: ClassVar[Supports] = Supports(
        bidirectional=False, cross=False, masks="padding", counts=True, remembers=True, maps=False,
        one_length="the blocks that are there hang on the length",
    )  # fmt: skip
    expected_failures: ClassVar[dict[str, str]] = {
        "static-cache": "its layers have no room for compressed blocks"
    }
    #: Blocks of a cache's room would be read as blocks of keys.
    roomy: ClassVar[bool] = False
    changes: ClassVar[tuple[str, ...]] = ("mask",)  # in `attend`, a pattern for each branch
    beyond: ClassVar[tuple[str, ...]] = (
        "normalize: each branch has a softmax of its own, and weights are their gated sum",
        "aggregate: compressed blocks have values beside those of the tokens",
    )

    block: int = option("l, tokens of a compressed block", default=32, at_least=1)
    stride: int = option("d, tokens between their beginnings; divides both sizes", default=16, at_least=1)
    selected: int = option("l', tokens of a selected block", default=64, at_least=1)
    topk: int = option("selected blocks that a query reads", default=16, at_least=1)
    first: int = option("blocks at the beginning that are among them", default=1, at_least=0)
    recent: int = option(
        "blocks among them that end with the query's own, this one included", default=2, at_least=1
    )
    window: int | None = option(
        "w, tokens of the window, the query's own among them; None: no such branch", default=512,
        at_least=1,
    )  # fmt: skip
    compression: Literal["mlp", "mean"] = option("what makes a block one token", default="mlp")
    hidden: int | None = option(
        "width inside the MLPs; block times the width of a key or value unless given", default=None,
        at_least=1,
    )  # fmt: skip

    def setup(self) -> None:
        """Check how sizes go together.

        Raises:
            ValueError: naming the option.
        """
        super().setup()
        for name in ("block", "selected"):
            if getattr(self, name) % self.stride:
                raise UserError(f"stride must divide {name}={getattr(self, name)}, got {self.stride}")
        if self.topk < self.first + self.recent:
            raise UserError(
                f"topk must be at least first + recent = {self.first + self.recent}, got {self.topk}"
            )
        if self.score_mod is not None:
            raise UserError(
                f"position={self.own_position!r} changes the scores of pairs, and a compressed block "
                "stands at no one place; take none, learned, sinusoidal or rope"
            )

    def make_projections(self) -> None:
        """Those of attention, the gates and the compressions."""
        super().make_projections()
        self.make_branches(2 if self.window is None else 3, self.head_dim, self.head_dim)

    def make_branches(self, branches: int, key: int, value: int) -> None:
        """The gates of so many branches, and the compressions of keys and values that are so wide."""
        self.branches = branches
        self.gate_proj = nn.Linear(self.dim, self.heads * self.branches)

        def made(width: int) -> Compression:
            wide = (self.hidden or self.block * width) if self.compression == "mlp" else None
            return Compression(self.kv_heads, width, self.block, self.stride, wide)

        self.k_compress, self.v_compress = made(key), made(value)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; the gates stay beside."""
        inputs.notes["gates"] = self.gates(inputs.x)
        return super().project(inputs)

    def gates(
        self, x: Float[Tensor, "batch queries dim"]
    ) -> Float[Tensor, "batch heads queries branches"]:
        """The gates of compression, selection and window."""
        gates: Tensor = self.gate_proj(x).sigmoid().unflatten(2, (self.heads, -1)).transpose(1, 2)
        return gates

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The gated sum of what the branches give."""
        coarse, chosen = self.coarse(q, *self.summaries(k, v, inputs), self.blocks(q, k, inputs, 1))
        outs = [coarse, self.read(q, k, v, chosen, inputs)]
        if self.branches == 3:
            outs.append(self.near(q, k, v, inputs))
        gates = inputs.notes["gates"].to(q.dtype).split(1, dim=-1)
        return torch.stack([g * out for g, out in zip(gates, outs, strict=True)]).sum(0)

    def summaries(self, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Compressed keys and values of all blocks. A cache keeps those that are whole in every row, so
        that only the others are made."""
        held = inputs.recall("summaries")
        done = 0 if held is None else held.shape[2]
        k, v = (aligned(x, inputs)[:, :, done * self.stride :] for x in (k, v))
        made = self.k_compress(self.keys_of(k)), self.v_compress(self.values_of(v))
        if inputs.cache is None:
            return made
        wide = [x.shape[-1] for x in made]
        both = torch.cat(made, dim=-1)
        both = both if held is None else torch.cat((held.to(both.dtype), both), dim=2)
        if not traced():
            tokens, valid = inputs.key_positions.shape[-1], inputs.valid
            shortest = tokens if valid is None else int(valid.sum(-1).min())
            whole = max(0, (shortest - self.block) // self.stride + 1)
            inputs.remember("summaries", both[:, :, :whole])
        k, v = both.split(wide, dim=-1)
        return k, v

    def coarse(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Blocks
    ) -> tuple[Float[Tensor, "batch heads queries value"], Int[Tensor, "batch kv_heads queries topk"]]:
        """Attention to compressed blocks, and the blocks that it has each query read."""
        rank, count = tokens.of_queries, -(-tokens.count // self.selected)
        before = tokens.count - q.shape[2]

        def some(q: Tensor, k: Tensor, v: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
            weights = self.shares(q, k, rank)
            chosen = self.choose(self.importance(weights.detach(), count), rank // self.selected)
            weights = torch.dropout(weights, self.dropout, self.training).to(v.dtype)
            return ops.grouped_product(weights, v), chosen

        parts = []
        for at in stretches(q.shape[2], ROWS):
            ended = slice(max(0, (before + at.stop - self.block) // self.stride + 1))
            given = q[:, :, at], k[:, :, ended], v[:, :, ended], rank[:, at]
            parts.append(ops.recomputed(some, *given, when=q.shape[2] > ROWS))
        outs, chosen = zip(*parts, strict=True)
        return torch.cat(outs, dim=2), torch.cat(chosen, dim=2)

    def shares(
        self, q: Tensor, k: Tensor, rank: Int[Tensor, "rows queries"]
    ) -> Float[Tensor, "batch heads queries blocks"]:
        """Weights of compressed blocks, for queries that so many tokens stand before; in float32 at
        least, since half precision would make many alike that blocks are chosen by."""
        scores = ops.wide(ops.grouped_product(q * self.scale, k.mT))
        last = torch.arange(k.shape[2], device=q.device) * self.stride + self.block - 1
        return ops.softmax(scores.masked_fill(last > rank[:, None, :, None], -torch.inf))

    def importance(
        self, shares: Float[Tensor, "batch heads queries blocks"], count: int
    ) -> Float[Tensor, "batch kv_heads queries count"]:
        """What each of `count` selected blocks gets of the weights, its strides' sum over a group."""
        grouped: Tensor = shares.unflatten(1, (self.kv_heads, -1)).sum(2)
        if not grouped.shape[-1]:
            return grouped.new_zeros(*grouped.shape[:-1], count)
        beside, each = self.block // self.stride - 1, self.selected // self.stride
        strides = pad(grouped, (beside, beside)).unfold(-1, beside + 1, 1).sum(-1)
        strides = pad(strides, (0, count * each - strides.shape[-1]))
        found: Tensor = strides.unflatten(-1, (count, each)).sum(-1)
        return found

    def choose(
        self, scores: Float[Tensor, "batch kv_heads queries blocks"], own: Int[Tensor, "rows queries"]
    ) -> Int[Tensor, "batch kv_heads queries topk"]:
        """The blocks that each query reads, ascending, −1 behind the last; −∞ is never read."""
        block, own = torch.arange(scores.shape[-1], device=scores.device), own[:, None, :, None]
        always = (block < self.first) | (block > own - self.recent)
        scores = scores.masked_fill(always, torch.inf).masked_fill(block > own, -torch.inf)
        best: Tensor = ops.best_pages(scores.flatten(1, 2), self.topk).unflatten(1, scores.shape[1:3])
        return best

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys_and_blocks"]:
        """The gated sum of the maps: weights of tokens, and behind them of compressed blocks."""
        keys, gates = self.keys_of(k), inputs.notes["gates"].to(q.dtype).split(1, dim=-1)
        rank, count = self.blocks(q, k, inputs, 1).of_queries, -(-k.shape[2] // self.selected)
        shares = self.shares(q, self.k_compress(self.keys_of(aligned(k, inputs))), rank)
        chosen = self.choose(self.importance(shares.detach(), count), rank // self.selected)
        scores = ops.grouped_product(q * self.scale, keys.mT)
        seen = [self.chosen_pairs(q, keys, chosen, inputs)]
        if self.branches == 3:
            seen.append(dense_of(self.near_mask(q, keys, inputs), q, keys))
        maps = torch.stack([
            gate * ops.softmax(scores.masked_fill(~pairs, -torch.inf))
            for gate, pairs in zip(gates[1:], seen, strict=True)
        ]).sum(0)
        return torch.cat((maps, gates[0] * shares.to(maps.dtype)), dim=-1)

    def aggregate(
        self, weights: Float[Tensor, "batch heads queries keys_and_blocks"], v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries value"]:
        """Values of tokens and of compressed blocks, summed by their weights."""
        blocks = self.v_compress(self.values_of(aligned(v, inputs)))
        return super().aggregate(weights, torch.cat((self.values_of(v), blocks), dim=2), inputs)
