"""Powers of two for a prompt and for decoding: each token reads the near, the first, and few far blocks.

    token q reads   {k ≤ q:  i − j < w  or  j < s  or  i − j a power of two},   i = q//b, j = k//b

Tokens are counted by each row's own valid ones. Steps of one token see what a cache has left of the
same pattern, though all of the cache is read; several tokens behind a compressed cache see all that it
holds. Sliding-window layers and models that are not causal stay as they are.

Cost: (w + s + log₂(n/b))·b keys a token of the prompt. Reduces to full attention where the window covers
the text. The pattern itself, for layers: `power-mask`.

Source: "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from attlas.attach.call import Call
from attlas.attach.thinned import Text, Thinned
from attlas.catalog.registry import mechanism
from attlas.masks import Mask
from attlas.masks.power import power
from attlas.options import option


@mechanism(
    "power-attention", paper="power-attention",
    example={"size": 2, "window_blocks": 2, "sink_blocks": 1},
)  # fmt: skip
class PowerAttention(Thinned):
    """Let tokens read the newest blocks, the first ones, and those a power of two away."""

    everything: ClassVar[dict[str, Any]] = {"window_blocks": 10**6}
    comparable: ClassVar[tuple[str, ...]] = ("(window_blocks=4)", "(size=32, window_blocks=2)")
    #: The pattern hangs on places alone.
    whole_prompts = False

    size: int = option("tokens of a block", default=64, at_least=1)
    window_blocks: int = option("newest blocks, the token's own included", default=4, at_least=1)
    sink_blocks: int = option("first blocks, which all read", default=1, at_least=0)

    def setup(self) -> None:
        """Make the pattern."""
        super().setup()
        self.power = power(
            self.size, window_blocks=self.window_blocks, sink_blocks=self.sink_blocks
        )

    def pattern(self, text: Text) -> Mask:
        """The same for every text."""
        return self.power

    def mask(self, call: Call) -> Bool[Tensor, "#batch #heads #query keys"] | None:
        """What a step of one token reads; None for other calls."""
        slides = call.kwargs.get("sliding_window") is not None
        if call.q.shape[2] != 1 or slides or call.layer in self.dense_layers:
            return None
        held = call.original_positions
        if held is None:
            held = torch.arange(call.k.shape[2], device=call.q.device).expand(len(call.q), 1, -1)
        # A static cache has room behind the last token, which the model's own mask hides.
        _, ranks = call.rows.at(held.clamp(max=call.rows.seen - 1))
        ranks = ranks.repeat_interleave(call.q.shape[1] // held.shape[1], dim=1)
        own = call.ranks[0][:, None, :, None]
        zero = torch.zeros_like(own)
        return self.power.visible(zero, zero, own, ranks[:, :, None])
