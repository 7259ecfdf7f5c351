"""Dual attention: sensory heads send features, relational heads send how two tokens relate.

    sensory     Σ_j α_ij W_v x_j                            α: softmax attention, in every head
    relational  Σ_j α_ij (W_r r_ij + W_s s_j)               r_ij,l = φ(W_q^l x_i · W_k^l x_j / √p)
    y           [W_O sensory ; W_O' relational]             l = 1…R

The symbol s_j says who sends: it is looked up by softmax attention of x_j over a learned library
("symbolic"), by position, or by j − i ("relative", s_ij).

Cost: R more score products, and their sums for each relational head; memory quadratic in length. A
cache holds the relations' keys too, all heads side by side as one.
Reduces to softmax attention without relational heads.
Source: "Disentangling and Integrating Relational and Sensory Information in Transformer
Architectures"; φ is its program's, whose models share one library among all layers.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import UnknownName, at_least_one
from attlas.inputs import Inputs
from attlas.masks import Mask

ACTIVATIONS = {
    "identity": nn.Identity(), "relu": nn.ReLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(),
    "silu": nn.SiLU(), "gelu": nn.GELU("tanh"),
}  # fmt: skip


@mechanism("dual-attention", reduces_to=Reduction(
    "softmax", {"relational_heads": 0}, lambda m, plain: plain.load_state_dict(m.state_dict())
))  # fmt: skip
class DualAttention(Attention):
    """Relational and sensory heads side by side, the relational ones first.

    Args:
        relational_heads: how many of the heads; half unless given.
        relations: R, a divisor of relational_heads · head_dim; `relational_heads` unless given.
        symmetric: one projection for both sides of a relation.
        activation: φ.
        symbols: what a sender's symbol depends on.
        library: how many symbols: to choose from, positions, or distances to either side.
        symbol_heads: heads of the symbolic attention, a divisor of `dim`.
    """

    memory_law = "quadratic"
    expected_failures: ClassVar[dict[str, str]] = {"grouped-heads": "relations share no keys"}

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, relational_heads: int | None = None,
        relations: int | None = None, symmetric: bool = False, activation: str = "identity",
        symbols: Literal["symbolic", "positional", "relative"] = "symbolic", library: int = 512,
        symbol_heads: int = 4, **options: Any,
    ) -> None:  # fmt: skip
        self.relational = heads // 2 if relational_heads is None else relational_heads
        if relational_heads is not None and not 0 <= relational_heads < heads:
            raise ValueError(f"relational_heads takes 0 to {heads - 1}, got {relational_heads}")
        if activation not in ACTIVATIONS:
            raise UnknownName("activation", activation, ACTIVATIONS)
        if symbols not in ("symbolic", "positional", "relative"):
            raise UnknownName("symbols", symbols, ("symbolic", "positional", "relative"))
        if self.relational and dim % at_least_one("symbol_heads", symbol_heads):
            raise ValueError(f"symbol_heads must divide dim={dim}, got {symbol_heads}")
        self.relations = at_least_one("relations", relations or max(1, self.relational))
        self.symmetric, self.activation, self.symbols = symmetric, activation, symbols
        self.library, self.symbol_heads = at_least_one("library", library), symbol_heads
        super().__init__(dim, heads, *args, **options)

    def make_projections(self) -> None:
        """The plain projections, of which relational heads have values and outputs of their own."""
        super().make_projections()
        n, d, group = self.relational, self.head_dim, self.heads // self.kv_heads
        if n % group or n * d % self.relations:
            name = "kv_heads" if n % group else "relations"
            raise ValueError(f"{name}: {n} relational heads of {d} cannot be divided by it")
        if n == 0:
            return
        own = self.dim * n // self.heads
        self.v_proj = nn.Linear(self.dim, (self.heads - n) // group * d, bias=self.bias)
        self.o_proj = nn.Linear((self.heads - n) * d, self.dim - own, bias=self.bias)
        self.symbol_proj = nn.Linear(self.dim, n // group * d, bias=self.bias)
        self.relational_o_proj = nn.Linear(n * d, own, bias=self.bias)
        self.relation_q = nn.Linear(self.dim, n * d, bias=False)
        self.relation_k = None if self.symmetric else nn.Linear(self.dim, n * d, bias=False)
        self.relation_out = nn.Parameter(torch.empty(n, d, self.relations))
        nn.init.kaiming_uniform_(self.relation_out, a=math.sqrt(5))
        if self.symbols == "symbolic":
            self.symbol_query = nn.Linear(self.dim, self.dim)
            self.templates = nn.Parameter(torch.randn(self.library, self.dim))
        rows = 2 * self.library + 1 if self.symbols == "relative" else self.library
        self.symbol_library = nn.Parameter(torch.randn(rows, self.dim))

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, the relations' after the heads'; values, the symbols' before tokens'."""
        x, tokens = inputs.x, inputs.tokens
        if inputs.context is not None and self.symbols == "relative":
            raise ValueError("context cannot be given with symbols='relative': there is no j − i")
        q, k, v = self.q_proj(x), self.k_proj(tokens), self.v_proj(tokens)
        if self.relational:
            q = torch.cat((q, self.relation_q(x)), dim=-1)
            k = torch.cat((k, (self.relation_k or self.relation_q)(tokens)), dim=-1)
            if self.symbols != "relative":
                v = torch.cat((self.symbol_proj(self.symbols_of(inputs)), v), dim=-1)
        return self.split_heads(q), self.split_heads(k), v[:, None]

    def symbols_of(self, inputs: Inputs) -> Tensor:
        """The symbol of each sender, [batch, tokens, dim]."""
        if self.symbols == "positional":
            if (tokens := inputs.key_positions.shape[-1]) > self.library:
                raise ValueError(
                    f"library={self.library} symbols are too few for {tokens} positions"
                )
            return self.symbol_library[inputs.token_positions].expand_as(inputs.tokens)
        asked = self.symbol_query(inputs.tokens).flatten(0, 1)
        q, k, v = (
            rearrange(x, "t (h d) -> 1 h t d", h=self.symbol_heads)
            for x in (asked, self.templates, self.symbol_library)
        )
        return rearrange(ops.attend(q, k, v), "1 h (b t) d -> b t (h d)", b=len(inputs.tokens))

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Positions turn the heads' queries and keys, not the relations'."""
        own_q, own_k = super().position(q[:, : self.heads], k[:, : self.kv_heads], inputs)
        k = torch.cat((own_k, k[:, self.kv_heads :]), dim=1)
        q = torch.cat((own_q, q[:, self.heads :]), dim=1)
        return q, rearrange(k, "b h t d -> b 1 t (h d)")

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """The maps of the heads; then, for every relational head, its map times each relation."""
        k = self.split_heads(k[:, 0])
        maps = super().weigh(q[:, : self.heads], k[:, : self.kv_heads], mask, inputs)
        if self.relational == 0:
            return maps
        related = maps[:, : self.relational, None] * self.relate(q, k)[:, None]
        return torch.cat((maps, related.flatten(1, 2)), dim=1)

    def relate(self, q: Tensor, k: Tensor) -> Tensor:
        """r of all pairs, [batch, relations, queries, keys]."""
        q, k = (
            rearrange(x, "b n t d -> b t (n d)").unflatten(-1, (self.relations, -1)).transpose(1, 2)
            for x in (q[:, self.heads :], k[:, self.kv_heads :])
        )
        relations: Tensor = ACTIVATIONS[self.activation]((q * q.shape[-1] ** -0.5) @ k.mT)
        return relations

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Values summed by each head's map, and relations by theirs."""
        n, v = self.relational, self.split_heads(v[:, 0])
        weights = torch.dropout(weights, self.dropout, self.training)
        maps = weights[:, : self.heads]
        if n and self.symbols == "relative":
            named = self.split_heads(self.symbol_proj(self.symbol_library)[None])
            parts = (self._by_distance(maps[:, :n]), named), (maps[:, n:], v)
            heads = torch.cat([m @ ops.repeated(x, m.shape[1]) for m, x in parts], dim=1)
        else:
            heads = maps @ ops.repeated(v, maps.shape[1])
        if n == 0:
            return heads
        related = weights[:, self.heads :].sum(-1).unflatten(1, (n, -1)).transpose(2, 3)
        return heads + pad(related @ self.relation_out.mT, (0, 0, 0, 0, 0, self.heads - n))

    def _by_distance(self, maps: Tensor) -> Tensor:
        """The weights of keys at the same distance j − i together, [batch, n, queries, symbols]."""
        queries, keys = maps.shape[2:]
        at = torch.arange(keys, device=maps.device)
        distance = (at - at[keys - queries :, None]).clamp(-self.library, self.library)
        totals = maps.new_zeros(*maps.shape[:3], len(self.symbol_library))
        return totals.scatter_add(-1, (distance + self.library).expand_as(maps), maps)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Each kind's heads joined and projected, sensory ones to the first channels."""
        y = super().output(heads[:, self.relational :], inputs)
        if self.relational == 0:
            return y
        own = rearrange(heads[:, : self.relational], "b h t d -> b t (h d)")
        return torch.cat((y, self.relational_o_proj(own)), dim=-1)
