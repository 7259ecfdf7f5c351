"""DELTA: a few layers look at everything, and tell the layers behind them where to look.

    first layers        full attention
    selection layer s   full attention;   w_j = Σ over all heads of its attention weight on token j
                        publishes the best pages by Σ_{j in page} w_j
    layer between       attends what the nearest selection layer below published, and the newest tokens

One list serves all heads of a layer, and holds for one step. The whole cache is kept, so that tokens can
return. A selection layer reads everything and then its keys again, for the row that fused attention
does not give; a layer between reads its budget. With a budget of the whole length it is full attention.

Source: "DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning". Which layers
select, and how a page's score is made of its tokens' (here: the sum), the paper's text not being at
hand, are our choice; with pages of one token the second does not arise. A first selection layer near
the bottom looks at its neighbours alone and misleads all behind it, so that it comes after a quarter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from attlas.attach.call import Call
from attlas.cache.part import Role
from attlas.cache.row import key_bytes, weights_over
from attlas.cache.selection import PortionSelection, first_body, lengths_of
from attlas.cache.summaries import best_portion
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import Chosen, LayerState, StoredLayer

#: Selection layers, evenly spaced, unless some are named.
SELECTING = 3
#: Tokens that are packed at once, about: one by one would cost more than reading a few more.
BLOCK = 16


@mechanism(
    "delta-layer-aware-attention", aliases=("delta-layers",),
    example={"tokens": 8, "dense": 1, "selection_layers": (2, 4), "recent": 4},
)  # fmt: skip
class DeltaLayerAware(PortionSelection):
    """Attend, in most layers, the tokens that a selection layer below them read most."""

    #: Slots of one layer must be those of another, which dropping or sorting tokens by head would end.
    joins: ClassVar[tuple[Role, ...]] = ()
    without = ("dense_layers", "offload", "capacity")
    everything: ClassVar[dict[str, Any]] = {"tokens": 4096}
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.25)", "(keep=0.125)")

    keep: float | None = option(
        "share of the tokens older than recent that is published", default=None, above=0, at_most=1,
        kw_only=False,
    )  # fmt: skip
    dense: int | None = option(
        "so many of the first layers use full attention; a quarter unless given", default=None,
        at_least=0,
    )  # fmt: skip
    selection_layers: Sequence[int] | None = option(
        "layers that publish, those below the first of them being full too; three, evenly spaced "
        "behind the dense ones, unless given", default=None,
    )  # fmt: skip
    recent: int = option(
        "newest tokens that every layer reads, beside those that do not fill a block", default=32,
        at_least=0,
    )  # fmt: skip
    block: int = option(
        "tokens that are packed at once, a number of pages; about 16 unless given", at_least=1,
        factory=lambda part: part.page * max(1, BLOCK // part.page),
    )  # fmt: skip

    def setup(self) -> None:
        """Refuse to have no selection layer."""
        super().setup()
        if self.selection_layers is not None and not self.selection_layers:
            raise UserError("selection_layers names no layer; give at least one")

    def full_ones(self, full: Sequence[int]) -> int:
        """How many of a model's full-attention layers come before any may select."""
        return len(full) // 4 if self.dense is None else self.dense

    def selecting(self, full: Sequence[int]) -> tuple[int, ...]:
        """The selection layers of a model with these full-attention layers."""
        if self.selection_layers is not None:
            return tuple(self.selection_layers)
        behind = full[self.full_ones(full) :]
        return tuple(sorted({behind[i * len(behind) // SELECTING] for i in range(SELECTING)}))

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
        scores = weights.sum(dim=1, keepdim=True)
        if self.page > 1:
            scores = scores.unflatten(-1, (-1, self.page)).sum(dim=-1)
        lengths = lengths_of(body)
        pages = None if lengths is None else lengths[:, :1] // self.page
        index = best_portion(scores, self.portion, pages)
        assert layer.keys is not None
        heads = layer.keys.shape[1]
        return Chosen(index.expand(-1, heads, -1).contiguous(), self.page, body.slots)
