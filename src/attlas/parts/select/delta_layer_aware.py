"""DELTA: a few layers look at everything, and tell the layers behind them where to look.

    first layers        full attention
    selection layer s   full attention;   w_j = max over all heads of its attention weight on token j
                        publishes the K − L best pages by Σ_{j in page} w_j, of those before the last L
    layer between       attends what the nearest selection layer below published, and the last L pages

One list serves all heads of a layer, and holds for one step. The whole cache is kept, so that tokens can
return. A selection layer reads everything and then its keys again, for the row that fused attention
does not give; a layer between reads its budget of K pages. With a budget of the whole length it is full
attention.

Pages of 16 tokens, K = 64 and L = 8 are the authors' defaults, and so is the plan of a model of 28
layers: 0 and 1 full, 2, 14 and 22 selecting. The paper finds a model's selection layers by how far the
attention maps of neighbouring layers turn on a small calibration set (of 48 layers 2, 6 and 42); that is
not done here: without `selection_layers` the plan of 28 layers is stretched over the model's. A share
`keep` stands for K, and of a short context leaves one page beside the last L.

Source: "DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning" and its authors'
program; the calibration from a reader's note of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from attlas.attach.call import Call
from attlas.cache.part import Role
from attlas.cache.row import key_bytes, weights_over
from attlas.cache.selection import PortionSelection, first_body, lengths_of
from attlas.cache.summaries import Portion, best_portion
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import Chosen, LayerState, StoredLayer

#: The authors' pages of a budget, and of these the newest.
BUDGET, NEWEST = 64, 8
#: Their plan: of so many layers the first ones are full and these select.
LAYERS, FULL, SELECTING = 28, 2, (2, 14, 22)


@mechanism(
    "delta-layer-aware-attention", aliases=("delta-layers",),
    example={"tokens": 12, "page": 1, "dense": 1, "selection_layers": (2, 4), "recent": 4},
)  # fmt: skip
class DeltaLayerAware(PortionSelection):
    """Attend, in most layers, the pages that a selection layer below them read most."""

    #: Slots of one layer must be those of another, which dropping or sorting tokens by head would end.
    joins: ClassVar[tuple[Role, ...]] = ()
    without = ("dense_layers", "offload", "capacity", "block")
    everything: ClassVar[dict[str, Any]] = {"tokens": 4096}
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.25)", "(keep=0.125)")

    page: int = option("tokens that are packed, and chosen, together", default=16, at_least=1)
    keep: float | None = option(
        "share of a row's tokens that a step reads, the newest among them", default=None, above=0,
        at_most=1, kw_only=False,
    )  # fmt: skip
    tokens: int | None = option(
        "or their number, whole pages of them; 64 pages unless either is given", default=None,
        at_least=1,
    )  # fmt: skip
    dense: int | None = option(
        "so many of the first layers use full attention; two unless given, or a quarter of fewer than "
        "eight layers", default=None, at_least=0,
    )  # fmt: skip
    selection_layers: Sequence[int] | None = option(
        "layers that publish, those below the first of them being full too; unless given the first "
        "behind the dense ones, the middle one and that at eleven fourteenths", default=None,
    )  # fmt: skip
    recent: int = option(
        "newest tokens, within the budget, that every layer reads: whole pages, of which the last need "
        "not be full; eight pages unless given", at_least=0, factory=lambda part: NEWEST * part.page,
    )  # fmt: skip

    def setup(self) -> None:
        """Refuse to have no selection layer, and newest tokens that fill no pages or the budget.

        Raises:
            ValueError: naming `selection_layers`, `recent` or `tokens`.
        """
        super().setup()
        if self.selection_layers is not None and not self.selection_layers:
            raise UserError("selection_layers names no layer; give at least one")

    def asked(self) -> Portion:
        """How many pages a step reads, and how many of them are the newest."""
        if self.recent % self.page:
            raise UserError(
                f"recent must be a whole number of pages of {self.page}, got {self.recent}"
            )
        given = (self.keep, self.tokens) != (None, None)
        whole = Portion.asked(self.keep, self.tokens if given else BUDGET * self.page, self.page)
        newest = self.recent // self.page
        if whole.pages is not None and whole.pages <= newest:
            raise UserError(
                f"tokens={whole.pages * self.page} leaves nothing to choose beside recent={self.recent}"
            )
        return replace(whole, newest=newest)

    @property
    def unpacked(self) -> int:
        """One page less than the newest: with the tokens to come that fill a page these are `recent`."""
        return max(0, self.recent - self.page)

    def full_ones(self, full: Sequence[int]) -> int:
        """How many of a model's full-attention layers come before any may select."""
        return min(FULL, len(full) // 4) if self.dense is None else self.dense

    def selecting(self, full: Sequence[int]) -> tuple[int, ...]:
        """The selection layers of a model with these full-attention layers."""
        if self.selection_layers is not None:
            return tuple(self.selection_layers)
        dense, last = self.full_ones(full), len(full) - 1
        later = (place * len(full) // LAYERS for place in SELECTING[1:])
        places = {dense, *(min(max(dense, place), last) for place in later)}
        return tuple(full[place] for place in sorted(places))

    def source(self, layer: int, full: Sequence[int]) -> int | None:
        """The selection layer whose set a layer attends; None when it attends everything."""
        selecting = self.selecting(full)
        below = [number for number in selecting if number < layer]
        return None if layer in selecting or not below else max(below)

    def check(self, model: nn.Module) -> None:
        """Refuse selection layers that the model has not, or that are dense already."""
        super().check(model)
        full = tuple(self.states(self.fresh_layers(model), model))
        dense = self.full_ones(full)
        if len(full) <= dense:
            raise UserError(
                f"dense={dense} leaves none of the model's {len(full)} full-attention layers"
            )
        for number in self.selection_layers or ():
            if number not in full[dense:]:
                raise UserError(
                    f"selection_layers names layer {number}; with dense={dense} it takes "
                    f"full-attention layers of {full[dense:]}"
                )

    def choose(self, state: LayerState, body: Body, call: Call) -> Chosen | None:
        """What the nearest selection layer below published in this step."""
        published: Chosen | None = call.forward_pass.shared.get(
            (self.name, self.source(state.layer, state.full))
        )
        return published

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """In a selection layer publish, before anything is packed, in the slots of this step."""
        body, single = first_body(layer), call.q.shape[2] == 1
        if single and body is not None and state.layer in self.selecting(state.full):
            call.forward_pass.shared[self.name, state.layer] = self.published(layer, body, call)
            layer.read_bytes += key_bytes(body)
        super().later(layer, state, call)

    def published(self, layer: StoredLayer, body: Body, call: Call) -> Chosen:
        """The pages that all heads together read most."""
        weights = weights_over(layer, body, call.q, call.scaling, call.rows)
        scores = weights.amax(dim=1, keepdim=True).unflatten(-1, (-1, self.page)).sum(dim=-1)
        lengths = lengths_of(body)  # whole pages, as many in every head
        lengths = None if lengths is None else lengths[:, :1]
        index = best_portion(scores, self.portion, lengths, self.page)
        assert layer.keys is not None
        heads = layer.keys.shape[1]
        return Chosen(index.expand(-1, heads, -1).contiguous(), self.page, body.slots)
