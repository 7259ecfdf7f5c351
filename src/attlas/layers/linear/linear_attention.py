"""Linear attention: φ(q)·φ(k) takes the place of the exponential, and a state that of all keys.

    weights_ts = φ(q_t)·φ(k_s) / Σ_r φ(q_t)·φ(k_r)        φ(x) = elu(x) + 1
    S_t = S_{t−1} + φ(k_t) v_tᵀ      z_t = z_{t−1} + φ(k_t)      y_t = S_tᵀ φ(q_t) / z_tᵀ φ(q_t)

Cost: 2·n·d² multiply-adds a head, memory linear in n; dropout and pair-by-pair masks need the n² weights.
Reduces to nothing simpler.
Source: "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention".
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import elu

from attlas.bases.recurrent import RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs


@mechanism("linear-attention", paper="")
class LinearAttention(RecurrentAttention):
    """Attention by features that are never negative."""

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys as their product weighs: elu + 1."""
        return elu(q) + 1, elu(k) + 1
