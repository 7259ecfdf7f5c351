"""What every selection has in common: hold all keys, and in each step read the few that matter.

The prompt is attended to exactly. Then its tokens are packed, without padding and page by page, into
the layer's first body (which a quantiser may have made already); a call of one token reads the slots
of it that `choose` names, and all slots behind it, the newest. Calls of several tokens, as a question
behind the context, read everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.attach.part import Selector
from attlas.cache.part import CachePart, Role, absorb
from attlas.catalog.kinds import SELECT, Kind
from attlas.errors import UserError, at_least_one
from attlas.storage.body import Body, GrownBody
from attlas.storage.coded import CodedBody
from attlas.storage.layer import Chosen, LayerState, StoredLayer, Taken
from attlas.storage.packed import PackedBody
from attlas.storage.rows import Rows
from attlas.storage.tiered import TieredBody

#: Bodies that a selection packs itself, by the name under which it puts them.
PACKED = ("packed", "tiered")


class Selection(CachePart, Selector):
    """Base of the selections. A subclass gives `choose`, and `summarize` when it prepares for it.

    Args:
        page: tokens that are packed, and may be chosen, together.
        recent: newest tokens that are always read, beside those that do not fill a block.
        dense_layers: layers in which every step reads everything.
        block: tokens that are packed at once, a number of pages; one page unless given.
        offload: hold what is packed in host memory, and on the device what was read last.
        capacity: tokens a head that the device then holds; as many as a step reads unless given.

    Raises:
        ValueError: a page, block or capacity below 1, a block that is no number of pages, a
            negative number, or a capacity without `offload`.
    """

    kind: ClassVar[Kind] = SELECT
    #: A selection chooses which pairs may meet.
    stages: ClassVar[tuple[str, ...]] = ("mask",)
    role: ClassVar[Role] = "select"
    joins: ClassVar[tuple[Role, ...]] = ("evict", "quantize")

    def __init__(
        self,
        *,
        page: int = 1,
        recent: int = 0,
        dense_layers: Sequence[int] = (),
        block: int | None = None,
        offload: bool = False,
        capacity: int | None = None,
    ) -> None:
        if recent < 0:
            raise UserError(f"recent must be at least 0, got {recent}")
        if any(number < 0 for number in dense_layers):
            raise UserError(f"dense_layers takes numbers of layers, got {tuple(dense_layers)}")
        self.page, self.recent = at_least_one("page", page), recent
        self.dense_layers = tuple(dense_layers)
        self.block = page if block is None else at_least_one("block", block)
        if self.block % page:
            raise UserError(f"block={block} is no number of pages of {page} tokens")
        if capacity is not None and not offload:
            raise UserError(f"capacity={capacity} is of the device tier; give offload=True with it")
        self.offload = offload
        self.capacity = None if capacity is None else at_least_one("capacity", capacity)

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
        self, layer: StoredLayer, state: LayerState, rows: Rows
    ) -> None:
        """Pack all but the newest tokens, unless a quantiser does, and summarise what is packed.

        Raises:
            ValueError: `offload`, of what a quantiser encoded.
        """
        offload = self.offload and state.layer not in self.dense_layers
        if not layer.bodies or any(name in PACKED for name in layer.bodies):
            pack = partial(_tiered, capacity=self.capacity) if offload else _packed
            absorb(layer, rows, pack, recent=self.recent, block=self.block)
        elif offload:
            raise UserError(
                f"offload moves keys and values as they came; this cache holds them as "
                f"{', '.join(layer.bodies)}"
            )
        body = first_body(layer)
        if body is not None:
            self.summarize(state, body)

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Pack what is no longer new, a page at a time."""
        self.settle(layer, state, call.rows)

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


def lengths_of(body: Body) -> Int[Tensor, "batch kv_heads"] | None:
    """How many of the first slots hold tokens, by row and head; None when all do."""
    lengths = body.lengths if isinstance(body, GrownBody) else None
    return (
        lengths.to(body.device) if lengths is not None and isinstance(body, TieredBody) else lengths
    )


def keys_of(
    body: Body, start: int = 0, stop: int | None = None
) -> Float[Tensor, "batch kv_heads slots dim"]:
    """Keys of some slots of a body, as numbers whatever form they are held in."""
    if isinstance(body, TieredBody):
        return body.keys(start, stop)
    if isinstance(body, CodedBody):
        return body.k.read(start, stop).to(torch.float32)
    keys = body.read()[0][:, :, start:stop]
    return keys if isinstance(body, PackedBody) else keys.to(torch.float32)


def _packed(taken: Taken) -> dict[str, Body]:
    return {"packed": PackedBody(taken.k, taken.v, taken.index, taken.first)}


def _tiered(taken: Taken, capacity: int | None) -> dict[str, Body]:
    return {"tiered": TieredBody(taken.k, taken.v, taken.index, taken.first, capacity=capacity)}
