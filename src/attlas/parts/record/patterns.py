"""Patterns of chosen heads at all scales, for texts of any length.

    see `attlas.parts.record.pyramid`: cells of the whole text, and what each query reads most

Cost: one pass over the weights, held a block at a time, and a top-k per row; a grid of at most 1024²
cells and 33 numbers a query are kept for each head. Texts of up to 512 tokens are kept whole.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from attlas.attach.call import Call, ForwardPass
from attlas.attach.part import Recorder
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.parts.record.pyramid import Builder, Pyramid


@mechanism("patterns", paper="")
class PatternRecorder(Recorder):
    """Records the patterns of heads; name few of them, `heads={3: [4], 5: [1, 2]}`.

    The record is of one sequence: it grows while a cache carries the sequence on. The result stacks
    what each `Pyramid` holds, [layers, batch, heads, ...].
    """

    def setup(self) -> None:
        """Nothing is recorded yet."""
        super().setup()
        self._builders: dict[tuple[int, int], list[Builder]] = {}  # (layer, head) -> of each row

    def begin(self, forward_pass: ForwardPass) -> None:
        """A call without a past begins a new sequence."""
        if forward_pass.offset == 0:
            self._builders.clear()

    def take_back(self, seen: int) -> None:
        """Forget the rows of tokens behind the first `seen`; only short texts can.

        Raises:
            ValueError: a text that is not kept whole.
        """
        for builders in self._builders.values():
            for builder in builders:
                builder.take_back(seen)

    def update(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Take in a block of rows, in original positions."""
        if keys.ndim > 1:
            columns = call.forward_pass.offset + call.q.shape[2]
            at = keys.clamp(min=0).long()[:, :, None].expand_as(weights)
            weights = weights.new_zeros(*weights.shape[:3], columns).scatter_add_(-1, at, weights)
        heads = self.where.heads_of(call.layer) or range(weights.shape[1])
        for number, head in enumerate(heads):
            builders = self._builders.setdefault((call.layer, head), [])
            if not builders:
                builders.extend(Builder() for _ in range(len(weights)))
            if len(weights) % len(builders):
                raise UserError(
                    f"PatternRecorder recorded {len(builders)} rows and now sees {len(weights)}: which "
                    "of them stayed is not known; record in a session of its own"
                )
            times = len(weights) // len(builders)
            if times > 1:  # rows were repeated since
                builders[:] = [copy.deepcopy(b) for b in builders for _ in range(times)]
            for builder, row in zip(builders, weights, strict=True):
                builder.add(row[number])

    def patterns(self, row: int = 0) -> dict[tuple[int, int], Pyramid]:
        """(layer, head) -> its pattern, of one row of the batch."""
        return {at: self._builders[at][row].result() for at in sorted(self._builders)}

    def result(self) -> Any:
        """What the pyramids hold by name, [layers, batch, heads, ...].

        Raises:
            ValueError: layers of which different numbers of heads are recorded; ask `patterns`.
        """
        layers: dict[int, list[list[Builder]]] = {}
        for (layer, _), builders in sorted(self._builders.items(), key=lambda item: item[0]):
            layers.setdefault(layer, []).append(builders)
        if len({len(heads) for heads in layers.values()}) > 1:
            raise UserError("layers have different numbers of heads here; patterns() tells each alone")
        every = [
            [[builder.result() for builder in row] for row in zip(*heads, strict=True)]
            for heads in layers.values()
        ]
        kinds = ("mass", "maxima", "whole", "index", "weight", "rest")
        held = [name for name in kinds if getattr(every[0][0][0], name) is not None]
        return {
            name: torch.stack([
                torch.stack([torch.stack([getattr(p, name) for p in row]) for row in rows])
                for rows in every
            ])
            for name in held
        }  # fmt: skip
