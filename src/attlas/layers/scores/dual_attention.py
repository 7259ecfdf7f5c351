"""Dual attention: sensory heads send features, relational heads send how two tokens relate.

    sensory     Σ_j α_ij W_v x_j                            α: softmax attention, in every head
    relational  Σ_j α_ij (W_r r_ij + W_s s_j)               r_ij,l = φ(W_q^l x_i · W_k^l x_j / √p)
    y           [W_O sensory ; W_O' relational]             l = 1…R

The symbol s_j says who sends: it is looked up by softmax attention of x_j over a learned library
("symbolic"), by position, or by j − i ("relative", s_ij).

Cost: R more score products, and their sums for each relational head. A
cache holds the relations' keys too, all heads side by side as one.
Reduces to softmax attention without relational heads.
Source: "Disentangling and Integrating Relational and Sensory Information in Transformer
Architectures"; φ is its program's, whose models share one library among all layers.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import pad

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports

ACTIVATIONS = {
    "identity": nn.Identity(), "relu": nn.ReLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(),
    "silu": nn.SiLU(), "gelu": nn.GELU("tanh"),
}  # fmt: skip


@mechanism("dual-attention", reduces_to=Reduction(
    "softmax", {"relational_heads": 0}, lambda m, plain: plain.load_state_dict(m.state_dict())
))  # fmt: skip
class DualAttention(Attention):
    """Relational and sensory heads side by side, the relational ones first."""

    supports = Supports()
    changes = ("score",)
    beyond = (
        "project: relations have queries and keys of their own, and symbols take values' place",
    )
    expected_failures: ClassVar[dict[str, str]] = {"grouped-heads": "relations share no keys"}

    relational_heads: int = option(
        "how many of the heads, fewer than all; half unless given", at_least=0,
        factory=lambda layer: layer.heads // 2,
    )  # fmt: skip
    relations: int = option(
        "R, a divisor of relational_heads · head_dim; relational_heads unless given", at_least=1,
        factory=lambda layer: max(1, layer.relational_heads),
    )  # fmt: skip
    symmetric: bool = option("one projection for both sides of a relation", default=False)
    activation: Literal["identity", "relu", "sigmoid", "tanh", "silu", "gelu"] = option(
        "φ", default="identity"
    )
    symbols: Literal["symbolic", "positional", "relative"] = option(
        "what a sender's symbol depends on", default="symbolic"
    )
    library: int = option(
        "how many symbols: to choose from, positions, or distances to either side", default=512,
        at_least=1,
    )  # fmt: skip
    symbol_heads: int = option(
        "heads of the symbolic attention, a divisor of dim", default=4, at_least=1
    )

    def setup(self) -> None:
        """What makes relations and symbols."""
        super().setup()
        n, d = self.relational_heads, self.head_dim
        if n == 0:
            return
        if self.dim % self.symbol_heads:
            raise ValueError(f"symbol_heads must divide dim={self.dim}, got {self.symbol_heads}")
        self.symbol_proj = nn.Linear(self.dim, n * self.kv_heads // self.heads * d, bias=self.bias)
        self.relational_o_proj = nn.Linear(n * d, self.dim * n // self.heads, bias=self.bias)
        self.relation_q = nn.Linear(self.dim, n * d, bias=False)
        self.relation_k = None if self.symmetric else nn.Linear(self.dim, n * d, bias=False)
        self.relation_out = nn.Parameter(torch.empty(n, d, self.relations))
        nn.init.kaiming_uniform_(self.relation_out, a=math.sqrt(5))
        if self.symbols == "symbolic":
            self.symbol_query = nn.Linear(self.dim, self.dim)
            self.templates = nn.Parameter(torch.randn(self.library, self.dim))
        rows = 2 * self.library + 1 if self.symbols == "relative" else self.library
        self.symbol_library = nn.Parameter(torch.randn(rows, self.dim))

    def make_projections(self) -> None:
        """The plain projections, of which sensory heads alone have values and outputs."""
        super().make_projections()
        n, d, group = self.relational_heads, self.head_dim, self.heads // self.kv_heads
        if n and n >= self.heads:
            raise ValueError(f"relational_heads takes 0 to {self.heads - 1}, got {n}")
        if n % group or n * d % self.relations:
            name = "kv_heads" if n % group else "relations"
            raise ValueError(f"{name}: {n} relational heads of {d} cannot be divided by it")
        if n:
            sensory = self.heads - n
            self.v_proj = nn.Linear(self.dim, sensory // group * d, bias=self.bias)
            self.o_proj = nn.Linear(
                sensory * d, self.dim - self.dim * n // self.heads, bias=self.bias
            )

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys; values side by side as one head, the symbols' before the tokens'.

        Keys carry those of the relations, whose queries the sum makes.
        """
        x, tokens = inputs.x, inputs.tokens
        if inputs.context is not None and self.symbols == "relative":
            raise ValueError("context cannot be given with symbols='relative': there is no j − i")
        v = self.v_proj(tokens)
        if self.relational_heads:
            inputs.carry("relation keys", (self.relation_k or self.relation_q)(tokens)[:, None])
            if self.symbols != "relative":
                v = torch.cat((self.symbol_proj(self.symbols_of(inputs)), v), dim=-1)
        return self.split_heads(self.q_proj(x)), self.split_heads(self.k_proj(tokens)), v[:, None]

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
        return rearrange(ops.attend(q, k, v), "1 h (b t) d -> b t (h d)", t=inputs.tokens.shape[1])

    def relate(self, inputs: Inputs) -> Tensor:
        """r of all pairs, [batch, relations, queries, keys]."""
        q, k = (
            rearrange(x, "b 1 t (r p) -> b r t p", r=self.relations)
            for x in (self.relation_q(inputs.x)[:, None], inputs.carried["relation keys"])
        )
        relations: Tensor = ACTIVATIONS[self.activation]((q * q.shape[-1] ** -0.5) @ k.mT)
        return relations

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Values and symbols summed by each head's map, and relations by the relational heads'."""
        n, v = self.relational_heads, self.split_heads(v[:, 0])
        maps = torch.dropout(weights, self.dropout, self.training)
        if n and self.symbols == "relative":
            named = self.split_heads(self.symbol_proj(self.symbol_library)[None])
            parts = (self._by_distance(maps[:, :n]), named), (maps[:, n:], v)
            heads = torch.cat([m @ ops.repeated(x, m.shape[1]) for m, x in parts], dim=1)
        else:
            heads = maps @ ops.repeated(v, maps.shape[1])
        if n == 0:
            return heads
        related = torch.einsum("bnqk,brqk->bnqr", maps[:, :n], self.relate(inputs))
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
        y = super().output(heads[:, self.relational_heads :], inputs)
        if self.relational_heads == 0:
            return y
        own = rearrange(heads[:, : self.relational_heads], "b h t d -> b t (h d)")
        return torch.cat((y, self.relational_o_proj(own)), dim=-1)
