"""Delta correction of a sparse prefill: every γ-th query is also dense, and lends what was missed.

    out_t = sparse_t + (dense_s − sparse_s)      s = γ ⌊t/γ⌋,   the last queries dense

Works behind whatever makes the prompt's attention sparse, given before it:

    attach(model, SparsePrefill(sinks=4, recent=2048), DeltaCorrection(gamma=64))

Queries are counted by each row's own valid tokens. Of a prompt in several calls each call is corrected
by itself: groups are counted from its first token, and its last queries are dense. Texts packed into
one row borrow across their border. Decoding is left as it is. Dense is what the model's own mask lets
a query see.

Cost: (n/γ + tail)·n pairs beside those of the sparse attention. Reduces to full attention at γ = 1,
and with nothing sparse before it.

Source: "Delta Attention: Fast and Accurate Sparse Attention Inference by Delta Correction".
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attlas.attach.call import Call
from attlas.attach.part import Selector
from attlas.attach.thinned import is_prompt
from attlas.catalog.registry import mechanism
from attlas.ops.delta import delta_correction
from attlas.options import option


@mechanism("delta-correction", aliases=("delta-attention",), example={"gamma": 4, "tail": 4})
class DeltaCorrection(Selector):
    """Repair the output of a sparse prefill by full attention of every γ-th query."""

    #: What is summed is corrected.
    changes = ("aggregate",)
    whole_prompts = True
    beyond = ("output: the correction is added to the heads' outputs, where the sums arrive",)

    gamma: int = option(
        "queries from one that is dense to the next", default=64, at_least=1, kw_only=False
    )
    tail: int = option(
        "last queries that are dense, at least; gamma and the remainder may add to them", default=128,
        at_least=1,
    )  # fmt: skip

    def output(
        self, call: Call, heads: Float[Tensor, "batch query heads value_dim"]
    ) -> Float[Tensor, "batch query heads value_dim"]:
        """The heads' outputs with what sparse attention missed."""
        if not is_prompt(call):
            return heads
        # A static cache has room behind the last token.
        end = call.forward_pass.offset + call.q.shape[2]
        visible = None if call.model_mask is None else call.model_mask[..., :end]
        corrected = delta_correction(
            call.q, call.k[:, :, :end], call.v[:, :, :end], heads.transpose(1, 2),
            gamma=self.gamma, tail=self.tail, visible=visible, score_mod=call.score_mod,
            scale=call.scaling, sinks=call.sinks, valid=call.valid,
        )  # fmt: skip
        return corrected.transpose(1, 2).contiguous()
