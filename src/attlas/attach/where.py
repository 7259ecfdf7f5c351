"""Which layers, heads and spans of text a part is about: one meaning of these words everywhere.

    layers=[0, -1]                 numbers of layers, negative ones from the last; None for all
    heads=[2, 3]                   query heads of every layer; heads={4: [2, 3]} of layer 4 alone
    spans=[(3, 6), (8, 10)]        tokens 3, 4, 5, 8 and 9 of every row; one such list a row is taken too

Tokens of spans are counted by each row's own valid ones, so that padding on the left moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attlas.errors import UserError
from attlas.storage.rows import Rows

Layers: TypeAlias = Iterable[int] | None
Heads: TypeAlias = Iterable[int] | Mapping[int, Iterable[int]] | None
_Heads: TypeAlias = tuple[int, ...] | dict[int, tuple[int, ...]] | None
Span: TypeAlias = tuple[int, int]
Spans: TypeAlias = Sequence[Span] | Sequence[Sequence[Span]]


class Where:
    """Layers and heads, resolved against a model when it is attached to.

    Args:
        layers: numbers of layers; None for all, or for those that `heads` names.
        heads: query heads of every such layer, or of each layer its own; None for all.

    Raises:
        TypeError: something that is no number.
        ValueError: `layers` beside `heads` that are given by layer, or none at all.
    """

    def __init__(self, layers: Layers = None, heads: Heads = None) -> None:
        if isinstance(heads, Mapping):
            if layers is not None:
                raise UserError("heads by layer name their layers themselves; leave layers out")
            self.layers: tuple[int, ...] | None = _numbers("heads", heads)
            self.heads: _Heads = {n: _numbers("heads", each) for n, each in heads.items()}
        else:
            self.layers = None if layers is None else _numbers("layers", layers)
            self.heads = None if heads is None else _numbers("heads", heads)
        self._asked = self.layers, self.heads

    @property
    def given(self) -> bool:
        """Whether any layer or head was named."""
        return self._asked != (None, None)

    def resolve(self, layers: int, heads: int, who: str) -> None:
        """Turn numbers from the last into plain ones.

        Args:
            layers: how many the model has.
            heads: how many query heads a layer has.
            who: named in the message.

        Raises:
            ValueError: a layer or head that the model does not have.
        """
        numbers, chosen = self._asked
        if isinstance(chosen, dict):
            self.heads = {
                _within("layer", n, layers, who): tuple(
                    _within("head", h, heads, who) for h in each
                )
                for n, each in chosen.items()
            }
        elif chosen is not None:
            self.heads = tuple(_within("head", h, heads, who) for h in chosen)
        if numbers is not None:
            self.layers = tuple(_within("layer", n, layers, who) for n in numbers)

    def covers(self, layer: int) -> bool:
        """Whether a layer is among them."""
        return self.layers is None or layer in self.layers

    def heads_of(self, layer: int) -> tuple[int, ...] | None:
        """The query heads in a layer; None for all."""
        return self.heads.get(layer) if isinstance(self.heads, dict) else self.heads

    def over_heads(self, layer: int, heads: int, device: torch.device) -> Bool[Tensor, " heads"]:
        """True at the heads that are meant."""
        chosen = self.heads_of(layer)
        if chosen is None:
            return torch.ones(heads, dtype=torch.bool, device=device)
        return torch.isin(torch.arange(heads), torch.tensor(chosen)).to(device)


def in_spans(
    spans: Spans, ranks: Int[Tensor, "batch slots"], there: Bool[Tensor, "batch slots"]
) -> Bool[Tensor, "batch slots"]:
    """Which slots hold a token of the spans.

    Args:
        spans: for all rows, or for each row.
        ranks: how many valid tokens stand before each slot's in its row.
        there: whether it holds a valid token.

    Raises:
        ValueError: lists for another number of rows.
    """
    rows = rows_of(spans, ranks.shape[0])
    inside = torch.zeros_like(there)
    for row, each in enumerate(rows):
        for first, stop in each:
            inside[row] |= (ranks[row] >= first) & (ranks[row] < stop)
    return inside & there


def in_positions(
    positions: Iterable[int] | None, rows: Rows, count: int, batch: int, device: torch.device
) -> Bool[Tensor, "batch count"]:
    """Which of the last `count` tokens seen are named.

    Args:
        positions: tokens, counted by each row's own valid ones, negative ones from the last; None for
            all.
        rows: which tokens are valid.
        count: tokens that are asked about.
        batch: rows.
        device: of the answer.
    """
    ranks, there = rows.last(count, batch, device)
    if positions is None:
        return there
    totals = rows.totals(batch, device)[:, None]
    named = torch.zeros_like(there)
    for position in positions:
        named |= ranks == (position if position >= 0 else totals + position)
    return named & there


def rows_of(spans: Spans, batch: int | None = None) -> list[list[Span]]:
    """The spans of each row; checks that they are spans.

    Without a batch, of as many rows as there are lists, or of one.

    Raises:
        ValueError: an empty or reversed span, or lists for another number of rows.
    """
    given: list[Any] = list(spans)
    shared = all(_is_span(each) for each in given)
    for each in given:
        if not isinstance(each, tuple | list):
            raise UserError(
                f"spans takes (first, stop) or a list of them for each row, got {each!r}"
            )
    rows = [given] * (1 if batch is None else batch) if shared else [list(each) for each in given]
    if batch is not None and len(rows) != batch:
        raise UserError(f"spans has a list for each of {len(rows)} rows, the batch has {batch}")
    for row in rows:
        for span in row:
            if not _is_span(span) or not 0 <= span[0] < span[1]:
                raise UserError(f"spans takes (first, stop) with 0 <= first < stop, got {span!r}")
    return rows


def find_span(tokenizer: Any, input_ids: Sequence[int] | Tensor, text: str) -> Span:
    """The tokens of one row, its padding left out, that hold a text, as (first, stop).

    The first place where it stands is told. The whole text is covered: its first and last token may
    hold characters around it.

    Raises:
        ValueError: the text does not occur in what the tokens say.
    """
    ids = input_ids.flatten().tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    ends = [len(tokenizer.decode(ids[: count + 1])) for count in range(len(ids))]
    at = tokenizer.decode(ids).find(text)
    if at < 0 or not text:
        raise UserError(f"text {text!r} does not occur in the prompt")
    first = next(number for number, end in enumerate(ends) if end > at)
    stop = next(number for number, end in enumerate(ends) if end >= at + len(text)) + 1
    return first, stop


def _is_span(each: Any) -> bool:
    if not isinstance(each, tuple | list) or len(each) != 2:
        return False
    return all(isinstance(end, int) and not isinstance(end, bool) for end in each)


def _numbers(what: str, given: Iterable[int]) -> tuple[int, ...]:
    numbers = tuple(given)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{what} takes whole numbers, got {number!r}")
    if not numbers:
        raise UserError(f"{what} names none; give None for all")
    return numbers


def _within(what: str, number: int, count: int, who: str) -> int:
    if not -count <= number < count:
        raise UserError(f"{who} names {what} {number}; the model has {what}s 0 to {count - 1}")
    return number % count
