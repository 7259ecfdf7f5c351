"""Linformer: softmax attention to k mixtures of all keys, instead of to all keys.

    K' = E K      V' = F V      y = softmax(Q K'ᵀ / √d) V'          E, F [k, n] learned

The paper finds the matrix of attention close to rank k, so that a projection of the length loses little.
E and F are of one layer's own, of its heads each, of both keys and values, or of all layers of a model
(one `Projection` handed to all). Positions beyond the length at hand are left out.

Cost: 4·n·k·d multiply-adds a head, memory linear in n.
Reduces to softmax attention with k = n and E = F = I.
Source: "Linformer: Self-Attention with Linear Complexity". It gives no initialisation;
the authors' program's is taken, Xavier's with a gain of 1/√2. Causal masks mean nothing once positions
are mixed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import UserError, at_least_one
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports


class Projection(nn.Module):
    """E and F.

    Args:
        max_length: most tokens that they take, n.
        rank: mixtures that they make of those, k.
        heads: how many of each, 1 for all heads or one for each key head.
        shared: whether F is E.
    """

    def __init__(self, max_length: int, rank: int, heads: int = 1, shared: bool = False) -> None:
        super().__init__()
        sizes = {"heads": heads, "rank": rank, "max_length": max_length}
        shape = [at_least_one(name, size) for name, size in sizes.items()]
        most = (3.0 / (rank + max_length)) ** 0.5  # Xavier's bound, with a gain of 1/√2
        self.keys = nn.Parameter(torch.empty(shape).uniform_(-most, most))
        self.values = self.keys
        if not shared:
            self.values = nn.Parameter(torch.empty(shape).uniform_(-most, most))

    @property
    def max_length(self) -> int:
        """Most tokens that they take."""
        return self.keys.shape[-1]

    def forward(
        self, at: Integer[Tensor, "*rows keys"]
    ) -> tuple[Float[Tensor, "rows own rank keys"], Float[Tensor, "rows own rank keys"]]:
        """The columns of E and F at these positions."""
        at = at.view(-1, at.shape[-1])
        keys, values = (weight[..., at].movedim(2, 0) for weight in (self.keys, self.values))
        return keys, values


def _identities(layer: Any, plain: Any) -> None:
    plain.load_state_dict(
        {k: w for k, w in layer.state_dict().items() if not k.startswith("projection")}
    )
    for weight in layer.projection.parameters():
        weight.copy_(torch.eye(weight.shape[-1]).expand_as(weight))


@mechanism("linformer", reduces_to=Reduction(
    "softmax", {"rank": 11, "max_length": 11}, _identities,
), example={"rank": 4, "max_length": 1024})  # fmt: skip
class Linformer(Attention):
    """Attention to a fixed number of mixtures of the tokens; bidirectional."""

    supports = Supports(causal=False, masks="padding", counts=True)
    changes = ("project", "aggregate")  # `attend` mixes keys and values, and sums the mixtures
    beyond = ("normalize: the weights of mixtures, told as those of the tokens that are mixed",)

    rank: int = option("mixtures of all tokens, k", default=128, at_least=1)
    max_length: int = option("most tokens of a sequence, n", default=512, at_least=1)
    per_head: bool = option("whether every key head has an E and F of its own", default=False)
    share_kv: bool = option("whether F is E", default=False)
    shared_projection: Projection | None = option(
        "E and F of another layer, which this one shares, instead of its own",
        default=None, alias="projection",
    )  # fmt: skip

    def setup(self) -> None:
        """E and F.

        Raises:
            ValueError: a shared projection for other heads, or a position that adds to scores.
        """
        super().setup()
        if self.score_mod is not None:
            raise UserError("position: a bias on scores has no place where tokens are mixed")
        own = self.kv_heads if self.per_head else 1
        self.projection = self.shared_projection or Projection(
            self.max_length, self.rank, own, self.share_kv
        )
        heads = self.projection.keys.shape[0]
        if heads not in (1, self.kv_heads):
            raise UserError(
                f"projection must have 1 or kv_heads={self.kv_heads} of each matrix, got {heads}"
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """One fused call on the mixtures, all of which every query sees."""
        keys, values = self.mixing(k, inputs)
        keys, values = keys @ _shown(k, inputs), values @ _shown(v, inputs)
        return self.fused(q, keys, values, replace(inputs, pairs=None))

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """softmax(Q K'ᵀ / √d) F, the weights of the tokens that are mixed."""
        keys, values = self.mixing(k, inputs)
        of_mixtures = super().weigh(q, keys @ _shown(k, inputs), replace(inputs, pairs=None))
        whole = of_mixtures @ ops.repeated(values.expand(-1, self.kv_heads, -1, -1), q.shape[1])
        return _shown(whole.mT, inputs).mT

    def mixing(
        self, k: Tensor, inputs: Inputs
    ) -> tuple[Float[Tensor, "rows own rank keys"], Float[Tensor, "rows own rank keys"]]:
        """E and F at the positions of these keys.

        Raises:
            ValueError: more tokens than the projection takes.
        """
        most = self.projection.max_length
        if k.shape[2] > most:
            raise UserError(f"x must have at most max_length={most} tokens, got {k.shape[2]}")
        keys, values = self.projection(inputs.key_positions.clamp(0, most - 1))
        return keys, values


def _shown(x: Tensor, inputs: Inputs) -> Tensor:
    """[batch, heads, keys, …] with zeros at padding, which may hold anything."""
    return x if inputs.valid is None else x.masked_fill(~inputs.valid[:, None, :, None], 0.0)
