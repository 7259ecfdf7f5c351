"""A token's step captured: recorded as one CUDA graph, and run again without waiting for Python.

Decoding one token is a thousand small kernels that Python starts one by one, and a GPU waits for. A graph
starts them all at once. It holds addresses and numbers as they were: so what a step reads lies still
(`attlas.storage.seat`), tokens, positions and lengths are written to the device before each run, and what
parts count in Python they count behind it. Whatever else could differ from step to step is looked for
first, and a step in which it does is run as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attlas.attach.call import Call, ForwardPass
from attlas.attach.own import reading_rooms
from attlas.attach.prefill import tokens_of
from attlas.attach.recorded import Snapshot, fused, recorded
from attlas.attach.state import Attachment
from attlas.attach.under import Under
from attlas.errors import UserError
from attlas.hf.caches import (
    NAME,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)
from attlas.hf.sources import caching
from attlas.storage.layer import StoredLayer
from attlas.storage.seat import Seat
from attlas.storage.still import StateSeat, WindowSeat
from attlas.storage.twin import EmptySeat, MemorySeat
from attlas.tracing import HOLDING

#: Layers that hold no keys that grow, and their seats.
KINDS: dict[type, Any] = {
    StoredLayer: MemorySeat, DynamicSlidingWindowLayer: WindowSeat, LinearAttentionLayer: StateSeat,
}  # fmt: skip
#: Arguments of a step that differ from token to token, and are copied to where the graph reads them.
VARYING = ("input_ids", "inputs_embeds", "position_ids", "cache_position")


class Step:
    """The step of one token over one cache, captured as it first runs.

    Args:
        held: the session.
        forward: of the tower, without what captures it.
        cache: whose layers are seated.
        name: under which the tower takes the cache.
        arguments: of the first call.
        valid: which of its tokens are no padding; None when all are.
        fuses: `torch.compile` is to fuse what stands between products and attention.

    Attributes:
        first: what the first call gave.
        why_not: why the step could be run but not recorded; None where it was.
        runs: how often it has run since.

    Raises:
        ValueError: what the step does cannot be recorded.
    """

    def __init__(
        self,
        held: Attachment,
        forward: Callable[..., Any],
        cache: Any,
        name: str,
        arguments: dict[str, Any],
        valid: Tensor | None,
        fuses: bool,
    ) -> None:
        self.held, self.layers, self.name = held, cache.layers, name
        self.forward = fused(held.tower.module, forward) if fuses else forward
        self._answers: list[Any] = []
        self._valid: Tensor | None = None
        self.runs = 0
        self._offset = int(cache.get_seq_length())
        ids = tokens_of(arguments)
        assert ids is not None
        self.batch, self.padded = ids.shape[0], valid is not None
        self.given = {n: t.clone() for n in VARYING if (t := arguments.get(n)) is not None}
        if "position_ids" not in self.given:
            self.given["position_ids"] = torch.full((1, 1), self._offset, device=ids.device)
        self.rest = {
            n: value for n, value in arguments.items()
            if n not in (*self.given, "attention_mask", name) and value is not None
        }  # fmt: skip
        self._untold = torch.empty(self.batch, 1, 1, 0, device=ids.device)
        self._seat(cache, ids.device)
        self.twin = twin_of(cache, [seat.twin for seat in self.seats])
        self._model = Snapshot(held.tower.module)
        self._told(cache, arguments, valid)
        try:
            output, found = recorded(self._record, ids.device)
            if fuses and isinstance(found, str):  # it was insisted on
                raise UserError(found)
        except Exception:
            for seat in self.seats:
                seat.undo()
            raise
        self.why_not = found if isinstance(found, str) else None
        self.run = found
        self.kind = type(output)
        self.first = self._ended(output, cache)

    def fits(self, arguments: dict[str, Any], valid: Tensor | None) -> bool:
        """Whether a later call is this step with other tokens, and everything lies where it lay."""
        for name, value in arguments.items():
            if name in ("attention_mask", self.name) or value is None:
                continue
            if name in VARYING:
                if name not in self.given or value.shape != self.given[name].shape:
                    return False
            elif name not in self.rest or self.rest[name] is not value:
                return False
        left_out = [n for n in self.given if n != "position_ids" and arguments.get(n) is None]
        if left_out or (valid is not None) != self.padded:
            return False
        return all(map(_lies, self.seats)) and self._model.same

    def __call__(self, cache: Any, arguments: dict[str, Any], valid: Tensor | None) -> Any:
        """What the tower gives for the next token."""
        self._told(cache, arguments, valid)
        assert not isinstance(self.run, str)
        self.runs += 1
        return self._ended(self.run(), cache)

    # What runs in the graph.

    def _record(self) -> Any:
        before = self.held.under
        mark = HOLDING.set(self._answers)
        twin_pass = ForwardPass(
            cache=self.twin, positions=self.given["position_ids"], ids=self.given.get("input_ids"),
            offset=self._offset, length=1,
        )  # fmt: skip
        self.held.under = Under(twin_pass)
        try:
            self._lengths.add_(1)  # with the token that comes
            output = self.forward(**self.rest, **self.given, **{self.name: self.twin})
            self._slots.add_(1)
            for seat in self.seats:
                seat.keep()
        finally:
            self.held.under = before
            HOLDING.reset(mark)
        hidden = getattr(output, "last_hidden_state", None)
        others = [n for n, x in output.items() if x is not hidden and x is not self.twin]
        if hidden is None or others:
            raise UserError(f"the model gives more than hidden states: {', '.join(others)}")
        return output

    # Around it.

    def _seat(self, cache: Any, device: torch.device) -> None:
        """Room for every layer, one after the other, and what the device is told of it."""
        for number, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer and number not in self.held.sources:
                self.layers[number] = StoredLayer()
                self.layers[number].take_over(layer)
        stored = [x for x in self.layers if isinstance(x, StoredLayer) and x.keys is not None]
        shapes = [layer.keys.shape[:2] for layer in stored if layer.keys is not None]
        if any(shape[0] != self.batch for shape in shapes):
            raise UserError("the cache holds another batch than the call")
        sizes = [batch * heads for batch, heads in shapes]
        self._lengths = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._slots = torch.zeros(len(sizes), dtype=torch.int64, device=device)
        parts = zip(self._slots.split(1), self._lengths.split(sizes), shapes, strict=True)
        base = self.held.tower.module
        latents = {*caching(base, set(self.held.tower.layers.values())), *reading_rooms(self.held)}
        self.seats: list[Any] = []
        for number, layer in enumerate(self.layers):
            if number in self.held.sources:
                self.seats.append(EmptySeat(layer))
            elif isinstance(layer, StoredLayer) and layer.keys is not None:
                slot, lengths, shape = next(parts)
                told = slot, lengths.view(shape), self.padded
                self.seats.append(Seat(layer, *told, latents=number in latents))
            else:
                self.seats.append(KINDS[type(layer)](layer))
        self._stored = [seat for seat in self.seats if isinstance(seat, Seat)]

    def _told(self, cache: Any, arguments: dict[str, Any], valid: Tensor | None) -> None:
        """Tokens, positions, padding and lengths, as the step is to read them."""
        for name, there in self.given.items():
            value = arguments.get(name)
            there.fill_(int(cache.get_seq_length())) if value is None else there.copy_(value)
        anew = False
        if valid is not None:
            before, self._valid = self._valid, valid.clone()
            anew = before is None or not torch.equal(valid[:, : before.shape[1]], before)
        for seat in self._stored:
            seat.tell(valid, anew)

    def _ended(self, output: Any, cache: Any) -> Any:
        """The output for the caller; the layers and the parts have counted on."""
        hidden = output.last_hidden_state.clone()  # the next run writes there again
        for seat in self.seats:
            seat.advance()
        forward_pass = self.held.forward_pass
        assert forward_pass is not None
        counting = [p for p in self.held.keepers if hasattr(p, "later")]
        for number, seat in enumerate(self.seats):
            if isinstance(seat, Seat):
                for part in counting:
                    self._count_on(part, number, seat.layer, forward_pass)
                seat.settle()
        return self.kind(last_hidden_state=hidden, **{NAME: cache})

    def _count_on(
        self, part: Any, number: int, layer: StoredLayer, forward_pass: ForwardPass
    ) -> None:
        """What a part does behind a step; of the call it is told the rows alone."""
        state = layer.learned.get(part.name)
        if state is not None:
            none, module = self._untold, self.held.tower.module
            call = Call(number, module, none, none, none, 1.0, None, forward_pass)
            call.cache_layer = layer
            part.later(layer, state, call)


def _lies(seat: Any) -> bool:
    """Whether a layer lies where the recorded step looks for it, or can be put back there."""
    if seat.ready:
        return True
    seat.put_back()
    return bool(seat.ready)


class TwinCache(DynamicCache):  # type: ignore[misc]
    """What a recorded step takes for the cache; how many tokens there are it cannot be asked."""

    recorded = True

    # The number of a layer would be a constant of the program.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, *args: Any, **kwargs: Any) -> Any:
        """As any cache."""
        return super().update(*args, **kwargs)

    def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
        """Anything, as masks alone ask for it and none is made."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Likewise."""
        return query_length, 0

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Refused: it would be the same in every step.

        Raises:
            ValueError: always.
        """
        raise UserError("the model counts the tokens of its cache in Python")


def twin_of(cache: Any, layers: list[Any]) -> TwinCache:
    """A cache like this one for a recorded step, with other layers."""
    other = object.__new__(TwinCache)
    other.__dict__.update({**cache.__dict__, "layers": layers})
    return other
