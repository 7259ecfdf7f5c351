"""Error-free linear attention: the delta rule followed exactly through continuous time.

    dS/dt = −k kᵀ S + k vᵀ  over β_t         S_t = S_{t−1} + a_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ
    a_t = (1 − e^{−β_t |k_t|²}) / |k_t|²      y_t = S_tᵀ q_t        β_t = σ(w_β · x_t)

The delta rule is the first step of Euler's method for this equation, a_t = β_t, which keys longer than
1 or large β make unstable. The exact step a_t |k_t|² < 1 is never too long, so that keys need no norm:
the length of a key says how firmly it writes.

Cost: 3·n·d² multiply-adds a head and n·d·c for the equations of chunks of c tokens; memory linear in n,
one state of d × d a head while decoding.
Reduces to no registered mechanism; for short keys it approaches the delta rule.
Source: "Error-Free Linear Attention is a Free Lunch: Exact Solution from Continuous-Time Dynamics". Its
demonstration bounds |k|² below by 10⁻⁶ and adds as much to it; here the limit a_t → β_t is taken. It
also normalises queries in its loop, but reads with the plain ones, as here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim


@mechanism("error-free-linear-attention", aliases=("efla",))
class ErrorFreeLinearAttention(RecurrentAttention):
    """The delta rule with exact steps and keys of any length."""

    claims = (
        Claim(
            "exact steps lose less to noise than the delta rule's",
            against=("fast-weight-delta-rule",), task="noise", split="16 pairs", steps=600, seeds=2,
        ),
    )  # fmt: skip

    supports = replace(
        RecurrentAttention.supports, bidirectional=False, cross=False, masks="padding"
    )
    normalized = False

    def setup(self) -> None:
        """The projection that gives the times over which keys write."""
        super().setup()
        self.beta_proj = nn.Linear(self.dim, self.kv_heads, bias=self.bias)

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """The exact step of each key's head."""
        return {"beta": exact_step(k, self.beta_proj(inputs.x).sigmoid().mT)}


def exact_step(
    k: Float[Tensor, "batch heads tokens width"], beta: Float[Tensor, "batch heads tokens"]
) -> Float[Tensor, "batch heads tokens"]:
    """(1 − e^{−β |k|²}) / |k|², which is β where there is no key."""
    wide = torch.promote_types(k.dtype, torch.float32)
    size = k.to(wide).square().sum(-1)
    none = size < torch.finfo(wide).tiny
    step = -torch.expm1(-beta.to(wide) * size) / size.masked_fill(none, 1.0)
    return torch.where(none, beta.to(wide), step).to(beta.dtype)
