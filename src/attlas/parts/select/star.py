"""Star attention, phase one: hosts read their blocks of the context, each behind the first one.

    token i of the context sees   {j ≤ i:  j in i's block, or in the first},   a block: 1/hosts of it
    the question behind it sees everything

What a host works out for its copy of the first block, the anchor, is what the first host works out for
it, and is dropped there: so one pass under this pattern is what all hosts do. Places are those of the
whole text. A prompt's last `question` tokens are the question, and so is every later call: it, and
decoding, read all that is held, which hosts merge by `star-attention`.

Cost: n²/hosts pairs in all, in each host (n/hosts)² · 3/2. Reduces to full attention with one host.

Source: "Star Attention: Efficient LLM Inference over Long Sequences".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from attlas import masks
from attlas.attach.thinned import Text, Thinned
from attlas.catalog.registry import mechanism
from attlas.masks import Mask
from attlas.options import option


@mechanism("star-prefill", paper="star-attention", example={"hosts": 4, "question": 2})
class StarPrefill(Thinned):
    """Let blocks of a context attend to themselves and to the first block alone."""

    everything: ClassVar[dict[str, Any]] = {"hosts": 1}
    comparable: ClassVar[tuple[str, ...]] = ("(hosts=14, question=64)", "(hosts=36, question=64)")

    hosts: int = option("blocks that the context is cut into", default=4, at_least=1)
    question: int = option("last tokens of a prompt, which read everything", default=0, at_least=0)
    anchor: bool = option("every block sees the first", default=True)

    def pattern(self, text: Text) -> Mask:
        """Own and first blocks; everything for a question."""
        context = text.k.shape[2] - self.question
        if text.offset or context < 1:
            return masks.full
        size = -(-context // self.hosts)
        own = masks.block(size)
        rows = torch.arange(text.k.shape[2], device=text.q.device) >= context
        asks = masks.keys(rows.nonzero()[:, 0].tolist(), len(rows)).T if self.question else None
        seen = own | masks.sinks(size) if self.anchor else own
        return seen if asks is None else seen | asks
