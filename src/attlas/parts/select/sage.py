"""SageAttention for a prompt: all pairs are read, in 8 or 4 bits.

    out = softmax(δ_q δ_k Q̂ K̂ᵀ · scale) V̂ δ_v + v̄       see `attlas.ops.sage_attention`

Means and scales are those of a prompt's valid tokens. A prompt in pieces takes the mean of what is held
by then. What is cached stays as the model made it; decoding reads it in full precision. The kernel takes
8 bits, as is the default here; the paper's 4 bits with their correction are simulated.

Cost: n²/2 products in 8 bits. Reduces to full attention with bits and values both None.

Source: "SageAttention2 Technical Report: Accurate 4 Bit Attention for Plug-and-play Inference
Acceleration".
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attlas import masks
from attlas.attach.thinned import Text, Thinned
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.ops.delta import beside_sinks
from attlas.ops.sage_attention import sage_attention
from attlas.options import option


@mechanism("sage-prefill", paper="sage-attention-2")
class SagePrefill(Thinned):
    """Attend to a prompt with rounded queries, keys, weights and values."""

    everything: ClassVar[dict[str, Any]] = {"bits": None, "values": None}
    changes: ClassVar[tuple[str, ...]] = ("score", "aggregate")
    beyond: ClassVar[tuple[str, ...]] = ("mask: it is that of what thins prompts; all pairs are read",)
    comparable: ClassVar[tuple[str, ...]] = ("(bits=8)", "(bits=4)")

    bits: Literal[4, 8] | None = option("of queries and keys; None leaves them", default=8)
    values: Literal["fp8", "fp16"] | None = option(
        "what weights and values are rounded to; None leaves them", default="fp8"
    )
    per: Literal["thread", "block"] = option("what shares a scale", default="thread")

    @torch.no_grad()
    def attended(self, text: Text) -> Float[Tensor, "batch heads queries v_dim"]:
        """Attention in few bits.

        Raises:
            ValueError: the model or another part changes scores.
        """
        if text.score_mod is not None:
            raise UserError("sage-prefill multiplies integers, and cannot honour changed scores")
        pattern: masks.Mask | Tensor = masks.causal
        if text.seen is not None:
            sizes = text.q.shape[2], text.k.shape[2]
            pattern = masks.dense(masks.causal, *sizes, device=text.q.device) & text.seen
        out, lse = sage_attention(
            text.q, text.k, text.v, mask=pattern, scale=text.scale, bits=self.bits, values=self.values,
            per=self.per,
        )  # fmt: skip
        self.density[text.layer] = torch.ones(text.q.shape[1], device=text.q.device)
        return beside_sinks(out, lse, text.sinks)
