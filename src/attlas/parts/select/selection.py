"""What every selection has in common: hold all keys, and in each step read the few that matter.

The prompt is attended to exactly. Then its tokens are packed, without padding and page by page, into
the layer's first body (which a quantiser may have made already); a call of one token reads the slots
of it that `choose` names, and all slots behind it, the newest. Calls of several tokens, as a question
behind the context, read everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.errors import UserError, at_least_one
from attlas.parts.cache.part import CachePart, Role, absorb
from attlas.storage.body import Body, GrownBody
from attlas.storage.layer import Chosen, LayerState, StoredLayer, Taken
from attlas.storage.packed import PackedBody


class Selection(CachePart):
    """Base of the selections. A subclass gives `choose`, and `summarize` when it prepares for it.

    Args:
        page: tokens that are packed, and may be chosen, together.
        recent: newest tokens that are always read, beside those that do not fill a page.
        dense_layers: layers in which every step reads everything.

    Raises:
        ValueError: a page below 1, or a negative number.
    """

    #: A selection chooses which pairs may meet.
    stages = ("mask",)
    role: ClassVar[Role] = "select"
    joins: ClassVar[tuple[Role, ...]] = ("evict", "quantize")

    def __init__(self, *, page: int = 1, recent: int = 0, dense_layers: Sequence[int] = ()) -> None:
        if recent < 0:
            raise UserError(f"recent must be at least 0, got {recent}")
        if any(number < 0 for number in dense_layers):
            raise UserError(f"dense_layers takes numbers of layers, got {tuple(dense_layers)}")
        self.page, self.recent = at_least_one("page", page), recent
        self.dense_layers = tuple(dense_layers)

    # What a selection defines.

    def summarize(self, state: LayerState, body: Body) -> None:
        """Tokens were packed: bring the summaries in `state.tensors` up to the body's slots."""

    def choose(self, state: LayerState, body: Body, call: Call) -> Chosen | None:
        """What the one query of this call reads of the body; None for everything."""
        raise NotImplementedError

    # How attach uses it.

    def check(self, model: nn.Module) -> None:
        """Refuse layers that the model has not."""
        super().check(model)
        layers = len(self.fresh_layers(model))
        outside = [number for number in self.dense_layers if number >= layers]
        if outside:
            raise UserError(
                f"dense_layers names layer {outside[0]}; the model has layers 0 to {layers - 1}"
            )

    def settle(
        self, layer: StoredLayer, state: LayerState, real: Bool[Tensor, "batch seen"] | None
    ) -> None:
        """Pack all but the newest tokens, unless a quantiser does, and summarise what is packed."""
        if "packed" in layer.bodies or not layer.bodies:
            absorb(layer, real, _packed, recent=self.recent, block=self.page)
        body = first_body(layer)
        if body is not None:
            self.summarize(state, body)

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Pack what is no longer new, a page at a time."""
        self.settle(layer, state, call.step.real)

    def select(self, call: Call) -> Chosen | None:
        """The choice for a single token behind a settled context."""
        layer = call.cache_layer
        if not isinstance(layer, StoredLayer) or not layer.settled or call.q.shape[2] != 1:
            return None
        state, body = layer.learned.get(self.name), first_body(layer)
        if state is None or body is None or state.layer in self.dense_layers:
            return None
        return self.choose(state, body, call)


def first_body(layer: StoredLayer) -> Body | None:
    """The body that a selection chooses from."""
    return next(iter(layer.bodies.values()), None)


def real_slots(body: Body) -> Bool[Tensor, "batch kv_heads slots"] | None:
    """Which slots of a body hold a token; None when all do."""
    return None if body.index is None or body.index.amin() >= 0 else body.index >= 0


def lengths_of(body: Body) -> Int[Tensor, "batch kv_heads"] | None:
    """How many of the first slots hold tokens, by row and head; None when all do."""
    return body.lengths if isinstance(body, GrownBody) else None


def keys_of(
    body: Body, start: int = 0, stop: int | None = None
) -> Float[Tensor, "batch kv_heads slots dim"]:
    """Keys of some slots of a body, as numbers whatever form they are held in."""
    if isinstance(body, PackedBody):
        return body.read()[0][:, :, start:stop]
    return body.read()[0][:, :, start:stop].to(torch.float32)


def _packed(taken: Taken) -> dict[str, Body]:
    return {"packed": PackedBody(taken.k, taken.v, taken.index, taken.first)}
