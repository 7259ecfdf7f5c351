"""Attention with a cache of low rank folded into a layer's projections.

    k_low = (Uᵀ W_k) x      v_low = (Wᵀ W_v) x      out = (W_o W) heads

The bases U of keys and W of values are those of `eigen_attention`, which multiplies by them instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas import masks, ops
from attlas.storage.rotary import Rotary


@dataclass(frozen=True)
class Folded:
    """Attention of a layer with the bases merged into its projections, as the authors run it.

    Attributes:
        q: projection of queries; into the basis where nothing is rotated.
        k: projection of tokens to coordinates of keys.
        v: projection of tokens to coordinates of values.
        o: projection of coordinates of heads' outputs, out of the values' basis.
        basis: of keys.
        rotary: how keys, read back, and queries are rotated; None when they are not.
    """

    q: Float[Tensor, "queries model"]
    k: Float[Tensor, "keys model"]
    v: Float[Tensor, "values model"]
    o: Float[Tensor, "out outputs"]
    basis: Float[Tensor, "b_heads dim rank"]
    kv_heads: int
    rotary: Rotary | None = None

    def __call__(
        self,
        x: Float[Tensor, "batch tokens model"],
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens out"]:
        """Causal attention of x with itself; only coordinates of keys and values would be cached."""
        _, dim, rank = self.basis.shape
        width = rank if self.rotary is None else dim
        q = (x @ self.q.mT).unflatten(-1, (-1, width)).transpose(1, 2)
        k, v = (
            (x @ w.mT).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for w in (self.k, self.v)
        )
        if self.rotary is not None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            k = self.rotary.rotate(k @ self.basis.mT, positions)
            q = self.rotary.rotate(q, positions)
        heads = ops.attend(q, k, v, mask=masks.causal, scale=dim**-0.5)
        return heads.transpose(1, 2).flatten(2) @ self.o.mT


def fold(
    q_weight: Float[Tensor, "q_rows model"],
    k_weight: Float[Tensor, "k_rows model"],
    v_weight: Float[Tensor, "v_rows model"],
    o_weight: Float[Tensor, "out o_columns"],
    basis_k: Float[Tensor, "k_heads dim k_rank"],
    basis_v: Float[Tensor, "kv_heads v_dim v_rank"],
    rotary: Rotary | None = None,
) -> Folded:
    """The layer's projections with the bases merged in.

    k_low = Uᵀ W_k and v_low = Wᵀ W_v for each key head, o_up = W_o W for each query head; without
    rotation queries are projected alike, Uᵀ W_q, and scores are those of the coordinates.

    Args:
        q_weight: as the model has them, heads one below the other.
        k_weight: likewise.
        v_weight: likewise.
        o_weight: heads one beside the other.
        basis_k: directions of keys and queries; of one head when all share them.
        basis_v: directions of values.
        rotary: the model's rotation; None when it does not rotate.
    """
    kv_heads, v_dim, _ = basis_v.shape
    heads = o_weight.shape[1] // v_dim

    def into(basis: Tensor, weight: Tensor, count: int) -> Tensor:
        if basis.shape[0] not in (1, count):
            basis = basis.repeat_interleave(count // basis.shape[0], dim=0)
        folded: Tensor = (basis.mT @ weight.unflatten(0, (count, -1))).flatten(0, 1)
        return folded

    o = into(basis_v, o_weight.mT, heads).mT
    q = q_weight if rotary is not None else into(basis_k, q_weight, heads)
    return Folded(
        q, into(basis_k, k_weight, kv_heads), into(basis_v, v_weight, kv_heads), o, basis_k, kv_heads,
        rotary,
    )  # fmt: skip
