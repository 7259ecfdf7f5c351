"""Features that are exponentials of keys, kept in range by the largest key so far.

    e^{k_s − m_t},   m_t = max_{s≤t, d} k_s        S_t = e^{m_{t−1} − m_t} S_{t−1} + e^{k_t − m_t} v_tᵀ

The state is that of e^{k_s} over e^{m_t}, which cancels wherever outputs are divided by a sum or a norm.
A maximum over all positions would do the same, but a token cannot know those after it, nor may one large
key far behind bring the earlier ones to zero.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from attlas import ops
from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.inputs import Inputs

#: The maximum of no key at all.
NOTHING = -1e30


class ExponentialKeys(RecurrentAttention):
    """Linear attention whose `features` give queries ready, and logarithms of those of keys."""

    supports = replace(RecurrentAttention.supports, masks="padding")

    def terms(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Gates]:
        """The recurrence's, relative to the largest key, which is noted for the next pass."""
        q, logits, gates = super().terms(q, k, inputs)
        logits = ops.wide(logits)  # float16 has no number as low as NOTHING
        padding = None if inputs.valid_now is None else ~inputs.valid_now[:, None, :, None]
        if padding is not None:
            logits = logits.masked_fill(padding, NOTHING)
        so_far = self.largest(logits, inputs)
        inputs.notes["largest"] = so_far[:, :, -1:]
        causal = inputs.looks_back(self.pattern)
        top = so_far[:, :, 1:] if causal else so_far[:, :, -1:]
        k = (logits - top[..., None]).exp()
        if padding is not None:
            k = k.masked_fill(padding, 0.0)
        if causal:
            grown, decay = -so_far.diff(dim=2), gates.get("log_decay")
            gates = {"log_decay": grown if decay is None else decay + grown[..., None]}
        return q, k, gates

    def largest(
        self, logits: Float[Tensor, "batch heads tokens width"], inputs: Inputs
    ) -> Float[Tensor, "batch heads tokens_and_one"]:
        """The largest channel of any key so far, and before this pass."""
        tops = logits.amax(-1)
        before = inputs.recall("largest")
        before = torch.full_like(tops[:, :, :1], NOTHING) if before is None else before
        return torch.cat((before, tops), dim=2).cummax(2).values

    def recur(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The recurrence; a cache keeps the largest key beside its state."""
        out = super().recur(q, k, v, inputs)
        inputs.remember("largest", inputs.notes["largest"])
        return out
