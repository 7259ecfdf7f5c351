"""Recycled attention: read in full now and then, and meanwhile what that reading found.

    full step t₀:    attends all keys;   w = Σ over the heads of a query group of its attention row
                     the list becomes the K tokens of largest w
    step t > t₀:     attends the list and token t
                     t enters the list, and of these K + 1 the one of least w in this step's row leaves it

The prompt's last token is the first full step. Another comes every `stride` steps; with `similarity` also
when, looked at every `every` steps, the mean over heads of cos(q_t, q_t₀) falls below it; each layer
keeps its own time. Queries are compared as they meet the keys, that is rotated. Nothing is dropped. A
recycled step reads the list's pairs and its keys again, a full step everything and its keys again, for
the row that fused attention does not give. With stride 1, or K the whole length, it is full attention.
A list that is shorter than K grows to it; tokens that a quantiser has not encoded yet are read beside it.

Source: "Recycled Attention: Efficient inference for long-context language models", by a reader's digest:
K constant, stride 50 on RULER (10 on language modelling), similarity 0.8 looked at every 5 steps. That a
token may leave in the step in which it came and the mean over heads are our reading; the paper's code was
not to be had.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from attlas.attach.call import Call
from attlas.cache.row import key_bytes, weights_over
from attlas.cache.selection import PortionSelection, first_body, keys_of, lengths_of
from attlas.cache.summaries import best_portion
from attlas.catalog.registry import mechanism
from attlas.ops.reference import grouped_product
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import Chosen, LayerState, StoredLayer
from attlas.storage.packed import PackedBody
from attlas.storage.rows import Rows

STRIDE = 50


@mechanism("recycled-attention", aliases=("recycled",), example={"tokens": 12, "stride": 3})
class RecycledAttention(PortionSelection):
    """Attend the tokens that the last full step read most, or that came since and were read."""

    #: Everything is packed at a full step, token by token.
    without = ("page", "recent", "block", "offload", "capacity")
    everything: ClassVar[dict[str, Any]] = {"stride": 1}
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.25)", "(keep=0.125)")

    keep: float | None = option(
        "share of the tokens held that a recycled step reads, beside its own", default=None, above=0,
        at_most=1, kw_only=False,
    )  # fmt: skip
    tokens: int | None = option("or their number, K", default=None, at_least=1)
    stride: int | None = option(
        "every so many steps one is full; 50 unless similarity is given alone", default=None,
        at_least=1,
    )  # fmt: skip
    similarity: float | None = option(
        "a step is full, too, when its query's cosine similarity falls below this; the paper's is 0.8",
        default=None, at_least=-1, at_most=1,
    )  # fmt: skip
    every: int = option("steps between two looks at the similarity", default=5, at_least=1)

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
        """The list; everything when a full step is due."""
        recycled = state.tensors.get("recycled")
        if recycled is None or self._grew(call.cache_layer, state, body):
            return None
        full = self._due(state, call)
        if full is None:
            return Chosen(recycled, 1, body.slots)
        if bool(full.all()):
            return None
        call.forward_pass.shared[self.name, state.layer] = full
        every = torch.arange(body.slots, dtype=torch.int32, device=recycled.device)
        index = torch.where(full[:, None, None], every, _widened(recycled, body.slots))
        return Chosen(index, 1, body.slots)

    def _due(self, state: LayerState, call: Call) -> Bool[Tensor, " batch"] | None:
        """The rows whose step is full; None when none is."""
        if self.similarity is None:
            # What counts the steps holds no number: its length is told without asking a device.
            steps = state.tensors["steps"]
            due = steps.shape[1] + 1 >= (self.stride or STRIDE)
            return steps.new_ones(steps.shape[0], dtype=torch.bool) if due else None
        since = state.tensors["since"] + 1
        alike = cosine_similarity(call.q.float(), state.tensors["query"].float(), dim=-1)
        full = (since % self.every == 0) & (alike.mean(dim=(1, 2)) < self.similarity)
        if self.stride is not None:
            full |= since >= self.stride
        return full if bool(full.any()) else None

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """After a recycled step let its token in; after a full one, of all rows or of some, list anew."""
        full = call.forward_pass.shared.get((self.name, state.layer))
        if call.chosen is not None:
            self._renew(layer, state, call)
            if full is None:
                return
        before = state.tensors.get("query")
        self.learn(state, call)
        if full is not None and before is not None:
            fresh = state.tensors["query"]
            state.tensors["query"] = torch.where(full[:, None, None, None], fresh, before)
        self._recycle(layer, state, call.rows, full)
        body = first_body(layer)
        layer.read_bytes += 0 if body is None else key_bytes(body)

    def _renew(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Count a step, and change the list by its token, unless a quantiser is to encode that."""
        tensors = state.tensors
        steps = tensors["steps"]
        tensors["steps"] = steps.new_empty(steps.shape[0], steps.shape[1] + 1, 0)
        if "since" in tensors:
            tensors["since"] = tensors["since"] + 1
        if (body := layer.bodies.get("packed")) is None:
            return
        listed = tensors["recycled"]
        before = _counts(body, listed)
        _pack(layer, call.rows)
        held = _counts(body, listed)
        entered = torch.where(held > before, before, -1)[..., None].to(listed)
        listed = torch.cat([listed, entered], dim=-1)
        weights = _attended(body, listed, call)
        layer.read_bytes += key_bytes(body) * listed.shape[-1] // max(1, body.slots)
        least = weights.argmin(dim=-1, keepdim=True)
        room = self.portion.of_rows(held) if self.portion.pages is None else self.portion.pages
        crowded = ((listed >= 0).sum(dim=-1) > room)[..., None]
        listed = listed.scatter(-1, least, torch.where(crowded, -1, listed.gather(-1, least)))
        # Ascending, what is empty behind.
        listed = torch.where(listed < 0, body.slots, listed).sort(dim=-1).values
        listed = torch.where(listed < body.slots, listed, -1)
        width = self.portion.pages or self.portion.of(body.slots)
        tensors["recycled"] = listed[..., :width].contiguous()

    def _recycle(
        self, layer: StoredLayer, state: LayerState, rows: Rows, full: Bool[Tensor, " batch"] | None
    ) -> None:
        """Take the list anew, in the rows whose step was full (None: in all)."""
        tensors = state.tensors
        _pack(layer, rows)
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
        if self.similarity is not None:
            since = tensors.get("since", recycled.new_zeros(recycled.shape[0]))
            tensors["since"] = torch.zeros_like(since) if full is None else since.masked_fill(full, 0)
        if layer.bodies.get("packed") is not body:
            tensors["lengths"] = _counts(body, recycled)

    def _grew(self, layer: StoredLayer, state: LayerState, body: Body) -> bool:
        """Whether a quantiser encoded tokens since the list was made, which it does not know."""
        if layer.bodies.get("packed") is body:  # our own, of which the list knows
            return False
        listed = state.tensors["recycled"]
        return not torch.equal(_counts(body, listed), state.tensors["lengths"])


def _pack(layer: StoredLayer, rows: Rows) -> None:
    """Pack all tokens, unless a quantiser encodes them."""
    if layer.bodies and "packed" not in layer.bodies:
        return
    counts = layer.lengths(rows)
    if max(counts, default=0):
        taken = layer.take(counts, rows)
        layer.put("packed", PackedBody(taken.k, taken.v, taken.index, taken.first))


def _attended(
    body: Body, listed: Int[Tensor, "batch kv_heads n"], call: Call
) -> Float[Tensor, "batch kv_heads n"]:
    """What the heads of a group together pay to the slots listed alone; ∞ where there is none."""
    keys = keys_of(body).to(call.q.dtype)
    at = listed.clamp(min=0).long()[..., None].expand(-1, -1, -1, keys.shape[-1])
    scores = grouped_product(call.q * call.scaling, keys.gather(2, at).mT)[:, :, 0].float()
    empty = listed < 0
    grouped = scores.unflatten(1, (keys.shape[1], -1)).masked_fill(empty[:, :, None], -torch.inf)
    weights: Tensor = grouped.softmax(dim=-1).sum(dim=2)
    return weights.masked_fill(empty, torch.inf)


def _widened(index: Int[Tensor, "batch heads n"], width: int) -> Int[Tensor, "batch heads m"]:
    """A list filled up with −1."""
    return pad(index, (0, width - index.shape[-1]), value=-1)


def _counts(body: Body, like: Int[Tensor, "batch heads n"]) -> Int[Tensor, "batch heads"]:
    """How many slots of each row and head hold tokens."""
    lengths = lengths_of(body)
    return like.new_full(like.shape[:2], body.slots) if lengths is None else lengths
