"""Changes of scores: the model's own, those of parts, one after the other, in terms of columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attlas.attach.call import Call
from attlas.attach.under import recording
from attlas.errors import UserError
from attlas.positions import ScoreMod


def changed_by(call: Call) -> ScoreMod | None:
    """What the model itself does to scores: soft cap, then position bias; None for nothing."""
    softcap: Any = call.kwargs.get("softcap")
    bias: Any = call.kwargs.get("position_bias")
    if bias is not None and recording():
        raise UserError("scores change by position")
    first = call.forward_pass.offset
    # The bias of a window is that of its slots.
    start = call.forward_pass.windows.get(call.source, 0)

    def cap(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        capped: Tensor = (s / softcap).tanh() * softcap
        return capped

    def add_bias(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        changed: Tensor = s + bias[b * (bias.shape[0] > 1), h, q - first, k - start]
        return changed

    mod = call.kwargs.get("score_mod")  # of a layer of ours
    mod = chained(mod, None if softcap is None else cap)
    return chained(mod, None if bias is None else add_bias)


def chained(first: ScoreMod | None, second: ScoreMod | None) -> ScoreMod | None:
    """One change after the other, as one; None for none."""
    if first is None or second is None:
        return first if second is None else second

    def together(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return second(first(s, b, h, q, k), b, h, q, k)

    return together


def in_slots(call: Call, offset: int) -> ScoreMod | None:
    """The score change in force in terms of slots, and of queries numbered from `offset`."""
    mod, columns = call.score_mod, call.original_positions
    first = call.forward_pass.offset - offset
    if mod is None or (columns is None and first == 0):
        return mod
    groups = call.groups

    def slots(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mod(s, b, h, q + first, k if columns is None else columns[b, h // groups, k])

    return slots
