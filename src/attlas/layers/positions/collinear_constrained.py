"""Collinear constrained attention (CoCA): a key points along the query in every rotary plane.

    t_n = relu(mean of the two halves of W_t x_n), the same in both channels of a plane
    k_mn = q_m ∘ t_n                                    the key of token n as query m sees it
    score[m, n] = R_m q_m · R_n k_mn / √d = Σ_i t_n,i |q_m,i|² cos((m − n) θ_i) / √d

So the angle between query and key is 0 before they are rotated, and no score grows with distance in a
plane before half a turn. The sum is the product of R_m (|q_i|², 0) and R_n (t_i, 0): keys
need no memory for pairs, and a cache holds R_n (t_i, 0).

Cost: that of rotary attention.
Reduces to no other mechanism here: a key without its query has no direction of its own.
Source: "Cure the headache of Transformers via Collinear Constrained Attention". The authors' code
multiplies channel by channel, (R_m q_m) · (q_m ∘ R_n (t, t)), which is another function once tokens
are rotated (`form="released"`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.ops.fused import fused
from attlas.options import option
from attlas.positions import Position, RoPE


@mechanism("collinear-constrained-attention", aliases=("coca",))
class CollinearConstrained(Attention):
    """Rotary attention with collinear keys; `k_proj` makes t."""

    claims = (
        Claim(
            "collinear keys keep rotary attention working beyond the trained length",
            task="extrapolation", split="64 tokens", steps=600,
        ),
    )  # fmt: skip

    #: `position` makes t of what `k_proj` gives, and the factors that the score multiplies.
    changes = ("project", "score")

    own_position: Position | str | None = option(
        "a RoPE of another base or scaling, pairing channels (i, i + d/2)", default="rope",
        alias="position",
    )  # fmt: skip
    form: Literal["paper", "released"] = option(
        "the paper's product or the released code's", default="paper"
    )

    def setup(self) -> None:
        """Refuse positions that are no rotations of both halves."""
        super().setup()
        if not isinstance(self.position_encoding, RoPE) or self.position_encoding.interleaved:
            raise ValueError(
                f"position must be a RoPE that is not interleaved, got {self.position_encoding!r}"
            )

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The two factors of the collinear product, rotated."""
        if self.form == "released":
            first, second = k.chunk(2, dim=-1)
            t = ((first + second) / 2).relu()
            rotated, k = super().position(q, torch.cat((t, t), dim=-1), inputs)
            return q * rotated, k
        rope = self.position_encoding
        assert isinstance(rope, RoPE)
        return (
            _squares(q, *rope.waves(q, inputs.positions)),
            _lengths(k, *rope.waves(k, inputs.token_positions)),
        )


@fused
def _squares(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R (|q_i|², 0) in each plane."""
    real, imaginary = q.chunk(2, dim=-1)
    squared = real.square() + imaginary.square()
    return torch.cat((squared * cos, squared * sin), dim=-1)


@fused
def _lengths(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R (t_i, 0) in each plane."""
    first, second = k.chunk(2, dim=-1)
    t = ((first + second) / 2).relu()
    return torch.cat((t * cos, t * sin), dim=-1)
