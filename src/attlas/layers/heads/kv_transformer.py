"""Key-value attention: no queries, every token is compared by its key.

    plain        weights = softmax(S),   S = k kᵀ / √d,  symmetric before the softmax
    positional   weights = softmax(Σ_c w_c (S_ij + p_ijc)) = softmax(Σw · S_ij + w · p_ij)
    p_ij = [rows(i), columns(j)]: sines and cosines in turn, 2⌈m/4⌉ of i and the rest of m of j

The positional form is not symmetric. S is scaled and w · p added by two more channels of the product.

Cost: plain attention without the query projection.
Reduces to softmax attention whose query projection is its key projection (`position_dim=0`).
Source: "Key-Value Transformer". The features, m = 10, are those of the author's code, which also adds
a bias to all logits; softmax does not see it, so it is left out here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option


def _keys_as_queries(layer: Attention, plain: Attention) -> None:
    plain.load_state_dict(layer.state_dict(), strict=False)
    plain.q_proj.load_state_dict(layer.k_proj.state_dict())


@mechanism("kv-transformer", aliases=("key-value",), reduces_to=Reduction(
    "softmax", {}, _keys_as_queries
))  # fmt: skip
class KeyValue(Attention):
    """Attention of keys to keys."""

    claims = (Claim("queries that are the keys still sort as well", task="sorting", margin=0.02),)

    position_dim: int = option(
        "m, features of a pair of positions; 0 for the plain form", default=0, at_least=0
    )

    def setup(self) -> None:
        """w, shared by the heads."""
        super().setup()
        if self.kv_heads != self.heads:
            raise ValueError(f"kv_heads must be heads={self.heads}: keys are compared with keys")
        if self.position_dim:
            self.pair_map = nn.Linear(self.position_dim, 1, bias=False)
            nn.init.xavier_uniform_(self.pair_map.weight)

    def make_projections(self) -> None:
        """Keys, values and the output."""
        super().make_projections()
        del self.q_proj

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Keys twice, and values; beside each key, what w · p has from its position."""
        k, v = (self.split_heads(part(inputs.tokens)) for part in (self.k_proj, self.v_proj))
        if self.position_dim:
            inputs.carry("column", _channel(self.shares(inputs.token_positions)[1], k))
        return (k if inputs.context is None else self.split_heads(self.k_proj(inputs.x))), k, v

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """[Σw q, rows · w, 1] and [k, 1, columns · w], whose product is the positional form's."""
        if not self.position_dim:
            return q, k
        row, column = _channel(self.shares(inputs.positions)[0], q), inputs.carried["column"]
        total = self.pair_map.weight.sum()
        ones = torch.ones_like(row)
        q = torch.cat((total * q, row / self.scale, ones / self.scale), dim=-1)
        return q, torch.cat((k, torch.ones_like(column), column), dim=-1)

    @ops.exact
    def shares(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What w · p has from each position as a row and as a column, [..., tokens]."""
        width = 2 * math.ceil(self.position_dim / 4)
        rows, columns = pad(self.pair_map.weight[0], (0, 2 * width - self.position_dim)).chunk(2)
        exact = torch.promote_types(rows.dtype, torch.float32)
        steps = torch.arange(0, width, 2, device=positions.device, dtype=exact)
        angles = positions[..., None].to(exact) * 10000 ** (-steps / width)
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(rows.dtype)
        return waves @ rows, waves @ columns


def _channel(numbers: Tensor, like: Tensor) -> Tensor:
    """One number a token, as a channel beside those of [batch, heads, tokens, head_dim]."""
    batch, heads, tokens, _ = like.shape
    if numbers.ndim == 2:
        numbers = numbers[:, None]
    return numbers.expand(batch, heads, tokens)[..., None]
