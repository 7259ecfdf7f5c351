"""The delta rule: a fast weight matrix that replaces what stood under a key, instead of adding to it.

    β_t = σ(w_β · x_t)        v̄_t = S_{t−1}ᵀ φ(k_t)
    S_t = S_{t−1} + β_t φ(k_t) (v_t − v̄_t)ᵀ        y_t = S_tᵀ φ(q_t)

    DPFP-ν:   r = [relu(x), relu(−x)],  φ(x) = [ r ⊙ roll(r, 1), …, r ⊙ roll(r, ν) ]      2 ν d features
    sum norm: φ(x) ← φ(x) / Σ φ(x)      L2 norm: φ(x) ← φ(x) / ‖φ(x)‖

`update="additive"` is linear attention's S_t = S_{t−1} + φ(k_t) v_tᵀ. With `normalize`, after "attention
normalisation" of the paper, z_t = Σ_{s≤t} φ(k_s) divides: y_t by z_t·φ(q_t), and for the delta rule, with
κ_t = z_{t−1}·φ(k_t), 1 at the first token, keys by κ_t, while β_t is multiplied by it. The authors'
program has layers besides that divide y_t alone: `normalize_keys=False`.

Cost: 2·n·d·d_φ multiply-adds a head and n·d_φ·c for the equations of chunks of c tokens; memory linear
in n, one state of d_φ × d a head while decoding.
Reduces to linear attention with additive updates, elu + 1, keys as they are and normalised outputs.
Source: "Linear Transformers Are Secretly Fast Weight Programmers". The authors' layer multiplies its
outputs by 1/√d, which W_O can as well. The paper's choice is the sum norm without `normalize`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import elu, relu

from attlas import ops
from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option


@mechanism("fast-weight-delta-rule", aliases=("delta-rule", "delta-net"), reduces_to=Reduction(
    "linear-attention",
    {"feature": "elu", "norm": "none", "update": "additive", "normalize": True, "eps": 0.0},
    lambda layer, plain: plain.load_state_dict(layer.state_dict()),
))  # fmt: skip
class FastWeightDeltaRule(RecurrentAttention):
    """Attention whose state is a matrix of weights that every token corrects."""

    claims = (
        Claim(
            "a state that replaces what stood under a key recalls what was written last, "
            "where a sum cannot",
            against=("fast-weight-delta-rule(update='additive')", "linear-attention"),
            task="rewriting(pairs=3, writes=8, length=20)", steps=800, seeds=2,
        ),
    )  # fmt: skip

    supports = replace(
        RecurrentAttention.supports, bidirectional=False, cross=False, masks="padding"
    )
    normalized = False

    feature: Literal["dpfp", "elu", "identity"] = option(
        "φ before its norm; elu is elu + 1", default="dpfp"
    )
    nu: int = option("ν of DPFP", default=1, at_least=1)
    norm: Literal["sum", "l2", "none"] = option(
        "what φ is divided by: its sum, its l2 length, or none", default="sum"
    )
    update: Literal["delta", "additive"] = option(
        "the delta rule, or the additive one of linear attention", default="delta"
    )
    normalize_sums: bool = option(
        "whether outputs (and keys, with the delta rule) are divided by what z_t gives",
        default=False, alias="normalize",
    )  # fmt: skip
    normalize_keys: bool = option(
        "whether `normalize` divides the keys of the delta rule too, as the paper does", default=True
    )
    eps: float = option("added to those divisors", default=1e-5, at_least=0)

    def setup(self) -> None:
        """The projection that gives the strengths of writing.

        Raises:
            ValueError: the sum of features that can cancel.
        """
        super().setup()
        if self.feature == "identity" and (self.norm == "sum" or self.normalize_sums):
            raise ValueError(
                "feature='identity' has no sum to divide by; norm takes 'l2' or 'none'"
            )
        if self.update == "delta":
            self.beta_proj = nn.Linear(self.dim, self.kv_heads, bias=self.bias)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """φ of both, divided by its norm."""
        return self.mapped(q), self.mapped(k)

    def mapped(
        self, x: Float[Tensor, "batch heads tokens width"]
    ) -> Float[Tensor, "batch heads tokens features"]:
        """φ(x)."""
        if self.feature == "dpfp":
            r = relu(torch.cat((x, -x), dim=-1))
            x = torch.cat([r * r.roll(i, -1) for i in range(1, self.nu + 1)], dim=-1)
        elif self.feature == "elu":
            x = elu(x) + 1
        if self.norm == "none":
            return x
        size = x.sum(-1, keepdim=True) if self.norm == "sum" else x.norm(dim=-1, keepdim=True)
        return ops.divided(x, size)

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """How strongly each key's head writes."""
        if self.update == "additive":
            return {}
        return {"beta": self.beta_proj(inputs.x).sigmoid().mT}

    def terms(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Gates]:
        """The recurrence's, with what z_t divides already divided."""
        q, k, gates = super().terms(q, k, inputs)
        if not self.normalize_sums:
            return q, k, gates
        totals = self.totals(k, inputs)
        asked = (totals * q).sum(-1, keepdim=True) + self.eps
        q = ops.divided(q, asked).to(q.dtype)
        if self.normalize_keys and (beta := gates.get("beta")) is not None:
            earlier = totals - k
            first = (earlier == 0).all(-1)
            kappa = (earlier * k).sum(-1).masked_fill(first, 1.0)
            divisor = (kappa + self.eps)[..., None]
            k = ops.divided(k, divisor).to(k.dtype)
            gates = {"beta": (beta * kappa).to(beta.dtype)}
        return q, k, gates

    def totals(
        self, k: Float[Tensor, "batch heads tokens features"], inputs: Inputs
    ) -> Float[Tensor, "batch heads tokens features"]:
        """z_t of every token, in float32 at least."""
        sums = k.to(torch.promote_types(k.dtype, torch.float32)).cumsum(2)
        before = inputs.recall("total")
        return sums if before is None else sums + before[:, :, None]

    def recur(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The recurrence; with `normalize`, a cache keeps z_t beside its state."""
        out = super().recur(q, k, v, inputs)
        if self.normalize_sums and inputs.cache is not None:
            keys = super().terms(q, k, inputs)[1]
            inputs.remember("total", self.totals(keys, inputs)[:, :, -1])
        return out
