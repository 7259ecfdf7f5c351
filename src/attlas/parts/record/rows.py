"""Recorders of one value (or a few) per query."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from attlas.attach.call import Call, ForwardPass
from attlas.attach.part import Recorder
from attlas.errors import UserError


class RowRecorder(Recorder):
    """Records `measure` of each query's weights.

    The record is of one sequence: it grows call by call while a cache carries the sequence on, and
    starts anew with the next one. Rows follow the batch as the model ran it (beam search reorders).
    """

    def setup(self) -> None:
        """Nothing is recorded yet."""
        super().setup()
        self._rows: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._first = 0

    def begin(self, forward_pass: ForwardPass) -> None:
        """A call without a past begins a new sequence."""
        if forward_pass.offset == 0:
            self._rows.clear()
        if not self._rows:
            self._first = forward_pass.offset

    def take_back(self, seen: int) -> None:
        """Forget the rows of tokens behind the first `seen`."""
        for layer, blocks in self._rows.items():
            room, kept = seen - self._first, []
            for block in blocks:
                if room > 0:
                    kept.append(block[:, :, :room])
                room -= block.shape[2]
            self._rows[layer] = kept

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
        self._append(call, self.measure(call, weights, queries, keys))

    def _append(self, call: Call, fresh: Tensor) -> None:
        """Put values behind those of the layer; rows that were repeated since are repeated here."""
        known = self._rows[call.layer]
        if known and len(known[0]) != len(fresh):
            known[:] = [repeated(block, len(fresh), self) for block in known]
        known.append(fresh)

    def result(self) -> Any:
        """[layers, batch, heads, tokens, ...], layers in the model's order."""
        return torch.stack([torch.cat(self._rows[layer], dim=2) for layer in sorted(self._rows)])


def repeated(x: Shaped[Tensor, "rows ..."], rows: int, who: Recorder) -> Shaped[Tensor, "more ..."]:
    """What is known of a batch whose rows were each repeated since.

    Raises:
        ValueError: the batch changed otherwise.
    """
    if len(x) == rows:
        return x
    if rows % len(x):
        raise UserError(
            f"{type(who).__name__} recorded {len(x)} rows and now sees {rows}: which of them stayed is "
            "not known; record in a session of its own behind batch_select_indices"
        )
    return x.repeat_interleave(rows // len(x), dim=0)
