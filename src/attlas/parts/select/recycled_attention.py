"""Recycled attention: read in full now and then, and meanwhile what that reading found.

    full step t₀:    attends all keys;   w = Σ over the heads of a query group of its attention row
                     kept for the steps that follow: the K tokens of largest w
    step t > t₀:     attends these K and the tokens t₀ … t

The prompt's last token is the first full step. Another comes every S steps, or when the mean over heads
of cos(q_t, q_t₀) falls below a threshold; queries are compared as they meet the keys, that is rotated.
Nothing is dropped. A recycled step reads at most K + S pairs of each head; a full step reads everything
and then the keys again, for the row that fused attention does not give. With S = 1, or K the whole
length, it is full attention.

Source: "Recycled Attention: Efficient inference for long-context language models". The default stride of
50 and the mean over heads are our reading; the paper's code was not to be had.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from attlas.attach.call import Call
from attlas.cache.row import key_bytes, weights_over
from attlas.cache.selection import PortionSelection, first_body, lengths_of
from attlas.cache.summaries import best_portion
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import Chosen, LayerState, StoredLayer
from attlas.storage.packed import PackedBody
from attlas.storage.rows import Rows

STRIDE = 50


@mechanism("recycled-attention", aliases=("recycled",), example={"tokens": 12, "stride": 3})
class RecycledAttention(PortionSelection):
    """Attend the tokens that the last full step read most, and all since."""

    #: Everything is packed at a full step, token by token.
    without = ("page", "recent", "block", "offload", "capacity")
    everything: ClassVar[dict[str, Any]] = {"stride": 1}
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.25)", "(keep=0.125)")

    keep: float | None = option(
        "share of the tokens held at a full step that is read until the next", default=None, above=0,
        at_most=1, kw_only=False,
    )  # fmt: skip
    tokens: int | None = option("or their number, K", default=None, at_least=1)
    stride: int | None = option(
        "every so many steps one is full; 50 unless similarity is given", default=None, at_least=1
    )
    similarity: float | None = option(
        "or a step is full when its query's cosine similarity falls below this", default=None,
        at_least=-1, at_most=1,
    )  # fmt: skip

    def setup(self) -> None:
        """Refuse two rules of when a step is full."""
        super().setup()
        if self.stride is not None and self.similarity is not None:
            raise UserError(
                f"give stride or similarity, not both; got stride={self.stride}, "
                f"similarity={self.similarity}"
            )

    def learn(self, state: LayerState, call: Call) -> None:
        """The last valid query so far."""
        query, known = call.q[:, :, -1:], state.tensors.get("query")
        if call.rows.valid is not None:
            _, valid = call.ranks
            numbers = torch.arange(valid.shape[1], device=valid.device)
            last = torch.where(valid, numbers, -1).amax(dim=1)[:, None, None, None]
            query = call.q.gather(2, last.clamp(min=0).expand_as(query))
            query = query if known is None else torch.where(last >= 0, query, known)
        state.tensors["query"] = query.clone()

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """After a full step: pack every token and remember which it read most."""
        self._recycle(layer, state, rows, None)

    def choose(self, state: LayerState, body: Body, call: Call) -> Chosen | None:
        """The recycled tokens; everything when a full step is due."""
        recycled = state.tensors.get("recycled")
        if recycled is None or self._grew(call.cache_layer, state, body):
            return None
        if self.similarity is None:
            # What counts the steps holds no number: its length is told without asking a device.
            if state.tensors["steps"].shape[1] + 1 >= (self.stride or STRIDE):
                return None
            return Chosen(recycled, 1, body.slots)
        alike = cosine_similarity(call.q.float(), state.tensors["query"].float(), dim=-1)
        full = alike.mean(dim=(1, 2)) < self.similarity
        if not bool(full.any()):
            return Chosen(recycled, 1, body.slots)
        if bool(full.all()):
            return None
        call.forward_pass.shared[self.name, state.layer] = full
        every = torch.arange(body.slots, dtype=torch.int32, device=recycled.device)
        index = torch.where(full[:, None, None], every, _widened(recycled, body.slots))
        return Chosen(index, 1, body.slots)

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Count a recycled step; after a full one, of all rows or of some, recycle anew."""
        full = call.forward_pass.shared.get((self.name, state.layer))
        if call.chosen is not None and full is None:
            steps = state.tensors["steps"]
            state.tensors["steps"] = steps.new_empty(steps.shape[0], steps.shape[1] + 1, 0)
            return
        before = state.tensors.get("query")
        self.learn(state, call)
        if full is not None and before is not None:
            fresh = state.tensors["query"]
            state.tensors["query"] = torch.where(full[:, None, None, None], fresh, before)
        self._recycle(layer, state, call.rows, full)
        body = first_body(layer)
        layer.read_bytes += 0 if body is None else key_bytes(body)

    def _recycle(
        self, layer: StoredLayer, state: LayerState, rows: Rows, full: Bool[Tensor, " batch"] | None
    ) -> None:
        """Take the list anew, in the rows whose step was full (None: in all)."""
        tensors = state.tensors
        _pack(layer, rows, full)
        body = first_body(layer)
        query = tensors["query"] if self.similarity is not None else tensors.pop("query")
        if body is None:
            return
        assert layer.keys is not None
        weights = weights_over(layer, body, query, state.scaling, rows)
        summed = weights.unflatten(1, (layer.keys.shape[1], -1)).sum(dim=2)
        recycled = best_portion(summed, self.portion, lengths_of(body))
        known = tensors.get("recycled")
        if full is not None and known is not None:
            width = max(recycled.shape[-1], known.shape[-1])
            recycled, known = _widened(recycled, width), _widened(known, width)
            recycled = torch.where(full[:, None, None], recycled, known)
        tensors["recycled"] = recycled
        tensors["steps"] = recycled.new_empty(recycled.shape[0], 0, 0)
        if layer.bodies.get("packed") is not body:
            tensors["lengths"] = _counts(body, recycled)

    def _grew(self, layer: StoredLayer, state: LayerState, body: Body) -> bool:
        """Whether a quantiser encoded tokens since the list was made, which it does not know."""
        if layer.bodies.get("packed") is body:  # our own, which grows in full steps alone
            return False
        listed = state.tensors["recycled"]
        return not torch.equal(_counts(body, listed), state.tensors["lengths"])


def _pack(layer: StoredLayer, rows: Rows, full: Bool[Tensor, " batch"] | None) -> None:
    """Pack the tokens of these rows (None: of all), unless a quantiser encodes them."""
    if layer.bodies and "packed" not in layer.bodies:
        return
    counts = layer.lengths(rows)
    if full is not None:
        counts = [n if some else 0 for n, some in zip(counts, full.tolist(), strict=True)]
    if max(counts, default=0):
        taken = layer.take(counts, rows)
        layer.put("packed", PackedBody(taken.k, taken.v, taken.index, taken.first))


def _widened(index: Int[Tensor, "batch heads n"], width: int) -> Int[Tensor, "batch heads m"]:
    """A list filled up with −1."""
    return pad(index, (0, width - index.shape[-1]), value=-1)


def _counts(body: Body, like: Int[Tensor, "batch heads n"]) -> Int[Tensor, "batch heads"]:
    """How many slots of each row and head hold tokens."""
    lengths = lengths_of(body)
    return like.new_full(like.shape[:2], body.slots) if lengths is None else lengths
