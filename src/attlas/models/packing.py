"""Packed sequences: several texts in one row, told apart by positions that begin anew.

`DataCollatorWithFlattening` of Transformers makes such rows. A row is taken apart into one row for each
text before attention, and joined again behind it, so that no mechanism sees more than one text: maps,
recurrences, convolutions and moving averages alike, at the cost of the padding of shorter texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn.functional import pad

from attlas.attention import Attention
from attlas.errors import UserError


@dataclass(frozen=True)
class Packing:
    """Where the tokens of packed rows stand once every text has a row of its own.

    Attributes:
        slots: of each token, row by row: number of its text · longest text + place in it.
        positions: of the tokens of every text, 0 behind the last.
        valid: which of them there are; None where all texts are equally long.
    """

    slots: Integer[Tensor, " tokens"]
    positions: Integer[Tensor, "texts longest"]
    valid: Bool[Tensor, "texts longest"] | None

    @classmethod
    def of(cls, position_ids: Integer[Tensor, "batch tokens"]) -> Packing | None:
        """How rows are packed; None where each holds one text.

        A text ends where the next position is not one more, as Transformers tells them apart.
        """
        start = starts(position_ids)
        if not bool(start[:, 1:].any()):
            return None
        start = start.flatten()
        text = start.long().cumsum(0) - 1
        place = torch.arange(len(text), device=text.device) - start.nonzero()[:, 0][text]
        longest = int(place.max()) + 1
        slots = text * longest + place
        texts = int(text[-1]) + 1
        positions = position_ids.new_zeros(texts * longest).scatter(0, slots, position_ids.flatten())
        valid = torch.zeros(texts * longest, dtype=torch.bool, device=slots.device)
        valid = valid.scatter(0, slots, torch.ones_like(start)).view(texts, longest)
        return cls(slots, positions.view(texts, longest), None if len(slots) == valid.numel() else valid)

    def apart(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "texts longest width"]:
        """Every text in a row of its own."""
        flat = x.new_zeros(self.positions.numel(), x.shape[-1])
        flat = flat.index_copy(0, self.slots, x.flatten(0, 1))
        return flat.view(*self.positions.shape, -1)

    def joined(
        self, y: Float[Tensor, "texts longest width"], batch: int
    ) -> Float[Tensor, "batch tokens width"]:
        """The texts in the rows they came from."""
        return y.flatten(0, 1)[self.slots].view(batch, -1, y.shape[-1])

    def joined_maps(
        self, maps: Float[Tensor, "texts heads longest longest"], batch: int
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """Maps of the texts as those of the rows: 0 between texts.

        Raises:
            ValueError: maps with columns that are no tokens, which belong to no text of a row.
        """
        longest = self.positions.shape[1]
        if maps.shape[-2:] != (longest, longest):
            raise UserError(
                f"output_attentions: maps of packed texts must be {[longest, longest]}, "
                f"got {list(maps.shape[-2:])}; give one text a row"
            )
        text, place = self.slots // longest, self.slots % longest
        text, place = text.view(batch, 1, -1), place.view(batch, 1, -1)
        head = torch.arange(maps.shape[1], device=maps.device)[:, None, None]
        each = maps[text[..., None], head, place[..., None], place[..., None, :]]
        same = text[..., None] == text[..., None, :]
        return each.masked_fill(~same, 0.0)


def starts(position_ids: Integer[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Where a text begins."""
    return pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True)


def pairs_within(position_ids: Integer[Tensor, "batch tokens"]) -> Bool[Tensor, "batch 1 t t"]:
    """True for pairs of tokens of one text: what is known of packed rows while they are compiled."""
    text = starts(position_ids).long().cumsum(-1)[:, None]
    return text[..., None] == text[..., None, :]


def unpacked(
    layers: Iterable[Any], position_ids: Tensor, batch: int
) -> tuple[Packing | None, Tensor | None]:
    """(how rows are packed, a mask of pairs instead), of a pass with neither a mask nor a cache.

    So Transformers has it: with one of them, positions only say where tokens stand. While a model is
    compiled nothing can be asked of the positions; layers that take any mask of pairs and keep nothing
    but keys and values then get one, and others break the graph here.

    Raises:
        ValueError: packed rows, and a layer that takes no mask, with texts of several lengths.
    """
    if position_ids.ndim == 1:
        position_ids = position_ids[None]
    position_ids = position_ids.expand(batch, -1)
    attentions = [m for layer in layers for m in layer.modules() if isinstance(m, Attention)]
    if torch.compiler.is_compiling() and all(
        a.supports.masks == "pairs" and a.supports.takes_back for a in attentions
    ):
        return None, pairs_within(position_ids)
    packing = Packing.of(position_ids)
    if packing is not None and packing.valid is not None:
        for attention in attentions:
            if attention.supports.masks == "none":
                raise UserError(
                    f"position_ids hold packed texts of several lengths, and "
                    f"{type(attention).__name__} takes no padding; give one text a row, or texts of "
                    "one length"
                )
    return packing, None
