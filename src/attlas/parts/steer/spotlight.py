"""Spotlight: marked text gets at least a given share of attention, in every layer and step.

    ψ = Σ_{j in spans} A_ij                     the share that the marked tokens have
    A'_ij ∝ A_ij · exp(b)  for j in spans       b = ln(target / ψ) if ψ < target, else 0

The new share lies between the old one and the target, since the softmax is redone with the others'
weights as they were; `exact` takes b = ln(target (1 − ψ) / (ψ (1 − target))), which reaches the target.
The paper's equation has a ψ for each query and head; published code has one for all of a layer's queries
and heads together (`over="layer"`). Queries that cannot see the marked tokens are left alone.

Cost: one more pass over the weights, held a block at a time. Reduces to the model alone at share = 0.

Source: "Spotlight Your Instructions: Instruction-following with Dynamic Attention Steering".
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.attach.blocks import weight_blocks
from attlas.attach.call import Call
from attlas.attach.part import Steerer
from attlas.attach.where import Spans
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.positions import ScoreMod


@mechanism("spotlight", example={"spans": [(2, 6)], "share": 0.4})
class Spotlight(Steerer):
    """Raise the attention on marked tokens to a target share."""

    #: A bias on the scores of the marked tokens.
    changes = ("score",)
    nothing: ClassVar[dict[str, Any]] = {"share": 0.0}

    spans: Spans = option("the marked tokens, see `attlas.attach.where`", kw_only=False)
    share: float = option("the target share", default=0.3, at_least=0, below=1, kw_only=False)
    over: Literal["row", "layer"] = option(
        "row: the share of each query and head, as in the paper; layer: of all of a row of the batch "
        "together, as in published code", default="row",
    )  # fmt: skip
    exact: bool = option("reach the target, not just near it; with over='row'", default=False)

    def setup(self) -> None:
        """Refuse one bias for all rows, which leaves their mean short of the target."""
        super().setup()
        if self.exact and self.over == "layer":
            raise UserError("exact reaches the target of each query: it takes over='row'")

    def score_mod(self, call: Call) -> ScoreMod | None:
        """The bias of this call's queries; None where all have the share already."""
        if not self.share:
            return None
        inside = call.in_spans(self.spans)
        here = self.where.over_heads(call.layer, call.q.shape[1], call.q.device)
        bias = self.bias(self.shares(call, inside, here)) * here[None, :, None]
        if not bool((bias != 0).any()):
            return None
        first, last = call.forward_pass.offset, inside.shape[1] - 1

        def marked(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            at = q - first if bias.shape[2] > 1 else q * 0
            changed: Tensor = s + bias[b, h, at].to(s.dtype) * inside[b, k.clamp(max=last)]
            return changed

        return marked

    def shares(
        self, call: Call, inside: Bool[Tensor, "batch columns"], heads: Bool[Tensor, " heads"]
    ) -> Float[Tensor, "batch heads #query"]:
        """ψ of every query and head, or of the steered heads together."""
        found, totals = [], []
        for weights, _, keys in weight_blocks(call):
            if keys.ndim == 1:
                marked = inside[:, None, None, keys]
            else:
                at = keys.clamp(min=0).long()
                marked = inside[:, None].expand(-1, at.shape[1], -1).gather(-1, at)[:, :, None]
            found.append((weights * marked).sum(dim=-1))
            totals.append(weights.sum(dim=-1))
        on, whole = torch.cat(found, dim=2), torch.cat(totals, dim=2)
        if self.over == "row":
            return on
        on, whole = (x[:, heads].sum(dim=(1, 2)) for x in (on, whole))
        return (on / whole.clamp(min=1e-30))[:, None, None].expand(-1, call.q.shape[1], 1)

    def bias(self, shares: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """What the scores of marked tokens gain; 0 where the share is reached, or is nothing."""
        wanted, held = self.share, shares.clamp(min=torch.finfo(shares.dtype).tiny)
        gain = (wanted / held).log()
        if self.exact:
            gain = gain + ((1 - held.clamp(max=wanted)) / (1 - wanted)).log()
        return torch.where((shares < wanted) & (shares > 0), gain, 0.0)
