"""Recorders of one value (or a few) per query."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach.call import Call, ForwardPass
from attlas.attach.part import Recorder


class RowRecorder(Recorder):
    """Records `measure` of each query's weights.

    The record is of one sequence: it grows call by call while a cache carries the sequence on, and
    starts anew with the next one. Rows follow the batch as the model ran it (beam search reorders).
    """

    def setup(self) -> None:
        """Nothing is recorded yet."""
        super().setup()
        self._rows: defaultdict[int, list[Tensor]] = defaultdict(list)

    def begin(self, forward_pass: ForwardPass) -> None:
        """A call without a past begins a new sequence."""
        if forward_pass.offset == 0:
            self._rows.clear()

    def measure(
        self,
        call: Call,
        weights: Float[Tensor, "batch heads query keys"],
        queries: Int[Tensor, " query"],
        keys: Int[Tensor, " keys"] | Int[Tensor, "batch heads keys"],
    ) -> Float[Tensor, "batch heads query *values"]:
        """The values of a block of queries; arguments as in `Recorder.update`."""
        raise NotImplementedError

    def update(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Measure a block and append it."""
        self._rows[call.layer].append(self.measure(call, weights, queries, keys))

    def result(self) -> Any:
        """[layers, batch, heads, tokens, ...], layers in the model's order."""
        return torch.stack([torch.cat(self._rows[layer], dim=2) for layer in sorted(self._rows)])
