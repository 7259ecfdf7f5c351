"""KDEformer: attention's sums as kernel densities, by hashed blocks and keys drawn by their values.

    a_ij = e^(q_i·k_j/√d)
    n_i  = Σ_{j in one's own block} a_ij v_j + Σ_{drawn j in others} a_ij v_j / (m P_j)
    d_i  = the same with 1 for v                     y_i = n_i / d_i
    P_j  ∝ |[v_j, 1]| / λ + 1/n                      λ the largest eigenvalue of Σ_j [v_j, 1] [v_j, 1]ᵀ

Both sums are unbiased over the draws. Blocks are of equal rank by an angular hash in Gray code, and the
chances P are not differentiated. There is no causal form.

Cost: n·(block + samples) pairs, memory linear in n; weights take n².
Reduces to softmax attention where one block holds all keys.
Source: "KDEformer: Accelerating Transformers via Kernel Density Estimation", by its authors' code: λ is
there the squared spectral norm, by twenty steps of the power method, here by an eigenvalue solver; one
hash serves all heads here; blocks need not divide the keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from attlas import ops
from attlas.bases.approximation import Draws, SampledAttention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.options import option


@mechanism("kdeformer", reduces_to=Reduction(
    "softmax", {"block": 4096}, lambda layer, plain: plain.load_state_dict(layer.state_dict()),
), example={"block": 4, "samples": 6})  # fmt: skip
class KDEformer(SampledAttention):
    """Attention by importance sampling: keys with large values are drawn more often."""

    supports = replace(SampledAttention.supports, causal=False)
    beyond = ("project: the plain one; each key also carries what it is drawn by",)
    expected_failures: ClassVar[dict[str, str]] = {
        "told-positions": "keys are drawn by their place in the tensor, another order draws others"
    }

    block: int = option("keys in a block", default=64, at_least=1)
    samples: int = option("keys drawn from all of them", default=800, at_least=1)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; each key carries the share |[v, 1]| / λ of its value."""
        q, k, v = super().project(inputs)
        with_one = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1).detach()
        if (valid := inputs.valid_now) is not None:
            with_one = with_one.masked_fill(~valid[:, None, :, None], 0.0)
        inputs.carry("share", self.shares(with_one)[..., None])
        return q, k, v

    @ops.exact
    def shares(self, v: Tensor) -> Tensor:
        """|v| / λ of each value [batch, kv_heads, keys], λ being that of all."""
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        largest = torch.linalg.eigvalsh(v.transpose(-1, -2) @ v)[..., -1:]
        share: Tensor = v.norm(dim=-1) / largest.clamp(min=torch.finfo(v.dtype).tiny)
        return share

    def draw(self, k: Tensor, chances: Tensor | None, rng: Generator) -> Draws:
        """Keys drawn by their shares and 1/n."""
        assert chances is not None
        return super().draw(k, chances + 1 / k.shape[2], rng)
