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
from attlas.cache.summaries import Portion
from attlas.catalog.kinds import SELECT, Kind
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.body import Body, GrownBody
from attlas.storage.coded import CodedBody
from attlas.storage.layer import Chosen, LayerState, StoredLayer, Taken
from attlas.storage.packed import PackedBody
from attlas.storage.rows import Rows
from attlas.storage.tiered import TieredBody

#: Bodies that a selection packs itself, by the name under which it puts them.
PACKED = ("packed", "tiered")


class Selection(CachePart, Selector):
    """Base of the selections. A subclass gives `choose`, and `summarize` when it prepares for it."""

    kind: ClassVar[Kind] = SELECT
    #: A selection chooses which pairs may meet.
    changes: ClassVar[tuple[str, ...]] = ("mask",)
    role: ClassVar[Role] = "select"
    joins: ClassVar[tuple[Role, ...]] = ("evict", "quantize")
    #: `choose` hangs on tensors alone, however many pages there are.
    chooses_on_device: ClassVar[bool] = False

    page: int = option("tokens that are packed, and may be chosen, together", default=1, at_least=1)
    recent: int = option(
        "newest tokens that are always read, beside those that do not fill a block", default=0,
        at_least=0,
    )  # fmt: skip
    dense_layers: Sequence[int] = option(
        "layers in which every step reads everything", default=(), at_least=0
    )
    block: int = option(
        "tokens that are packed at once, a number of pages; one page unless given", at_least=1,
        factory=lambda part: part.page,
    )  # fmt: skip
    offload: bool = option(
        "hold what is packed in host memory, and on the device what was read last", default=False
    )
    capacity: int | None = option(
        "tokens a head that the device then holds; as many as a step reads unless given", default=None,
        at_least=1,
    )  # fmt: skip

    def setup(self) -> None:
        """Refuse blocks that are no number of pages, and a capacity without a tier to hold it."""
        if self.block % self.page:
            raise UserError(f"block={self.block} is no number of pages of {self.page} tokens")
        if self.capacity is not None and not self.offload:
            raise UserError(
                f"capacity={self.capacity} is of the device tier; give offload=True with it"
            )

    @property
    def unpacked(self) -> int:
        """Newest tokens that are left as they are when a call's tokens are packed."""
        return self.recent

    # What a selection defines.

    def summarize(self, state: LayerState, body: Body) -> None:
        """Tokens were packed: bring the summaries in `state.tensors` up to the body's slots."""

    def choose(self, state: LayerState, body: Body, call: Call) -> Chosen | None:
        """What the one query of this call reads of the body; None for everything."""
        raise NotImplementedError

    # How attach uses it.

    @property
    def captures(self) -> bool:
        """What is chosen on the device, of what lies there."""
        return self.chooses_on_device and not self.offload and self._silent("select")

    def check(self, model: nn.Module) -> None:
        """Refuse layers that the model has not."""
        super().check(model)
        layers = len(self.fresh_layers(model))
        outside = [number for number in self.dense_layers if number >= layers]
        if outside:
            raise UserError(
                f"dense_layers names layer {outside[0]}; the model has layers 0 to {layers - 1}"
            )

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Pack all but the newest tokens, unless a quantiser does, and summarise what is packed.

        Raises:
            ValueError: `offload`, of what a quantiser encoded.
        """
        offload = self.offload and state.layer not in self.dense_layers
        if not layer.bodies or any(name in PACKED for name in layer.bodies):
            pack = partial(_tiered, capacity=self.capacity) if offload else _packed
            absorb(layer, rows, pack, recent=self.unpacked, block=self.block)
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
        self.compress(layer, state, call.rows)

    def select(self, call: Call) -> Chosen | None:
        """The choice for a single token behind a compressed context."""
        layer = call.cache_layer
        if not isinstance(layer, StoredLayer) or not layer.compressed or call.q.shape[2] != 1:
            return None
        state, body = layer.learned.get(self.name), first_body(layer)
        if state is None or body is None or state.layer in self.dense_layers:
            return None
        return self.choose(state, body, call)


class PortionSelection(Selection):
    """Base of the selections of which a step reads a share or a number of tokens."""

    keep: float | None = option(
        "share of a row's packed tokens that a step reads", default=None, above=0, at_most=1,
        kw_only=False,
    )  # fmt: skip
    tokens: int | None = option("or their number, whole pages of them", default=None, at_least=1)

    def setup(self) -> None:
        """Understand the budget."""
        super().setup()
        self.portion = self.asked()

    def asked(self) -> Portion:
        """How many pages a step reads."""
        return Portion.asked(self.keep, self.tokens, self.page)


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
