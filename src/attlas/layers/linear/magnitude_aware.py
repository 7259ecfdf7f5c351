"""Magnitude-aware linear attention: weights that grow with the query, and still sum to 1.

    s_ij = φ(q_i)·φ(k_j) / (n √d)        z_i = Σ_j s_ij        φ(x) = elu(x) + 1
    weights_ij = (1 + 1/z_i) R(φ(q_i))·R(φ(k_j)) / (n √d) − z_i / n
    y = W_O ( (concat_h weights_h v_h + DWC(v)) ⊙ (x W_G) )

Linear attention divides a query's length out: its weights are s_ij / z_i. Here a scale 1 + 1/z_i and
an offset z_i / n take the divisor's place, and the weights of longer queries lie further apart. The
offset is one more channel of queries and keys, −z_i and 1/n. R rotates half of a head's channels by
the row and half by the column; z is told by features that are not rotated.

Cost: 2·n·d² multiply-adds a head and n·dim·kernel², memory linear in n.
Reduces to no registered mechanism; the weights tend to linear attention's for short queries.
Source: "Rectifying Magnitude Neglect in Linear Attention" and its authors' program, which has the
factor 1/(n √d) of the similarities, ε beside z, the rotation and the initialisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.bases.grid import GatedOnGrid, start_small
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs


@mechanism("magnitude-aware-linear-attention", aliases=("mala",))
class MagnitudeAwareLinear(GatedOnGrid):
    """Linear attention whose weights are an affine function of the similarities."""

    def setup(self) -> None:
        """Projections that begin small."""
        super().setup()
        start_small(self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.o_proj)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Scaled queries and their offset, [batch, heads, queries, head_dim + 1]; keys likewise."""
        q, k = super().features(q, k, inputs)
        scale, keys = self.head_dim**-0.5, k.shape[2]
        z = self.mean_product(q, k) * scale
        q = self.rotated(q) * ((1 + 1 / (z + self.eps)) * scale)
        ones = torch.ones_like(k[..., :1])
        return torch.cat([q, -z], dim=-1), torch.cat([self.rotated(k), ones], dim=-1) / keys
