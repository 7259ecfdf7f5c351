"""What selections share: how much a step reads, summaries that grow with a body, the best of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.errors import UserError, at_least_one, exactly_one
from attlas.ops.pages import best_pages
from attlas.storage.body import Body, GrownBody
from attlas.storage.layer import LayerState

#: Gives the summaries, by name, of the tokens from one slot to another in some rows.
Make = Callable[[slice, int, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Portion:
    """How many of the pages that are packed a step reads, counted by each row's own; one is set.

    Attributes:
        keep: a share, in (0, 1]: `int(pages * keep)`, at least one.
        pages: a number.
        newest: pages that are read beside those that are chosen from, and count among them in both.

    Raises:
        ValueError: a share out of range, or a number below 1.
    """

    keep: float | None = None
    pages: int | None = None
    newest: int = 0

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UserError(f"keep must lie in (0, 1], got {self.keep}")
        if self.pages is not None:
            at_least_one("pages", self.pages)

    @classmethod
    def asked(cls, keep: float | None, tokens: int | None, page: int = 1) -> Portion:
        """A share, or a number of tokens that fill whole pages.

        Raises:
            ValueError: none or both, a share out of range, or tokens that fill no pages.
        """
        exactly_one("a selection", keep=keep, tokens=tokens)
        if tokens is not None and at_least_one("tokens", tokens) % page:
            raise UserError(f"tokens must be a whole number of pages of {page}, got {tokens}")
        return cls(keep, None if tokens is None else tokens // page)

    def of(self, pages: int) -> int:
        """How many of so many, beside the newest."""
        whole = pages + self.newest
        wanted = min(whole, self.pages or 1) if self.keep is None else int(whole * self.keep)
        return min(pages, max(1, wanted - self.newest))

    def of_rows(self, pages: Int[Tensor, "batch heads"]) -> Int[Tensor, "batch heads"]:
        """`of` for every row and head."""
        whole = pages + self.newest
        if self.keep is None:
            wanted = whole.clamp(max=self.pages or 1)
        else:
            wanted = (whole.double() * self.keep).long()
        return (wanted - self.newest).clamp(min=1).minimum(pages)


def best_portion(
    scores: Float[Tensor, "batch heads pages"],
    portion: Portion,
    lengths: Int[Tensor, "batch kv_heads"] | None = None,
    page: int = 1,
) -> Int[Tensor, "batch heads count"]:
    """The portion's best pages of each row and head, ascending as int32, −1 behind those of a shorter.

    Equal scores are decided for the earlier page, so that a row chooses in a batch as it does alone.

    Args:
        scores: of all pages.
        portion: how many are chosen.
        lengths: tokens of each row in the first pages, the last of which they may not fill; None when
            all have all pages.
        page: tokens of a page.
    """
    from attlas.ops.decode_kernels import choice_refused, choose_portion

    width = portion.of(scores.shape[-1])
    if lengths is None:
        return best_pages(scores, width)
    if choice_refused(scores) is None:
        return choose_portion(scores, width, lengths, page, portion.keep, portion.newest)
    pages = -(-lengths // page)
    each = pages.repeat_interleave(scores.shape[1] // pages.shape[1], dim=1)
    return first_best(scores, each, portion.of_rows(each), width)


def first_best(
    scores: Float[Tensor, "*rows pages"],
    there: Int[Tensor, "*rows"],
    wanted: Int[Tensor, "*rows"],
    width: int,
) -> Int[Tensor, "*rows width"]:
    """Each row's best pages of its first `there`, as many as it wants, as `best_portion` gives them.

    Args:
        scores: of all pages.
        there: how many of the first pages each row has.
        wanted: how many of them it takes.
        width: the most that any takes.
    """
    longest = scores.shape[-1]
    place = torch.arange(longest, device=scores.device)
    scores = scores.masked_fill(place >= there[..., None], -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]
    chosen = torch.where(place[: order.shape[-1]] < wanted[..., None], order, longest)
    chosen = chosen.sort(dim=-1).values
    return torch.where(chosen < longest, chosen, -1).to(torch.int32)


def extend(state: LayerState, body: Body, page: int, names: tuple[str, ...], make: Make) -> None:
    """Bring summaries, an entry for each page, up to the body's slots: new pages alone are made.

    A last page that is not full is made from the tokens it has, and again when it has more. `covered`
    remembers how far each row was summarised where that is not what the summaries' length says.

    Args:
        state: whose tensors [batch, heads, pages, width] are extended.
        body: what is summarised.
        page: slots of a page.
        names: of the tensors.
        make: gives them for the tokens of some rows from one slot, the first of a page, to another.
    """
    state.growing, state.counted = names, ("covered",)
    held = state.tensors[names[0]].shape[2] if names[0] in state.tensors else 0
    lengths, covered = body.lengths if isinstance(body, GrownBody) else None, None
    if (known := state.tensors.get("covered")) is not None:
        covered = known.tolist()
    elif lengths is None and held * page == body.slots:
        return
    stops = [body.slots] if lengths is None else lengths[:, 0].tolist()  # as many in every head
    if covered is None:
        covered = [held * page] * len(stops)
    stops = stops * (len(covered) // len(stops))
    if covered == stops:
        return
    spans = list(zip(covered, stops, strict=True))
    together = len(set(spans)) == 1
    groups = [
        (slice(None) if together else slice(row, row + 1), start // page, stop)
        for row, (start, stop) in enumerate(spans[:1] if together else spans)
        if start != stop
    ]
    made = [(rows, first, make(rows, first * page, stop)) for rows, first, stop in groups]
    for name in names:
        written = [(rows, first, found[name]) for rows, first, found in made]
        pages, batch = -(-body.slots // page), None if together else len(spans)
        state.tensors[name] = _written(state.tensors.get(name), written, batch, pages)
    if len(set(stops)) > 1 or stops[0] % page:
        sample = state.tensors[names[0]]
        rows = stops * (sample.shape[0] // len(stops))
        state.tensors["covered"] = torch.tensor(rows, dtype=torch.int32, device=sample.device)
    else:
        state.tensors.pop("covered", None)


def _written(
    before: Tensor | None, made: list[tuple[slice, int, Tensor]], batch: int | None, pages: int
) -> Tensor:
    """Summaries with those of some rows' new pages in their places."""
    _, first, sample = made[0]
    if batch is None and first == (0 if before is None else before.shape[2]):
        return sample if before is None else torch.cat([before, sample], dim=2)
    # What was there may be shared with a fork: it is copied, never written to.
    grown = sample.new_zeros(batch or sample.shape[0], sample.shape[1], pages, sample.shape[3])
    if before is not None:
        grown[:, :, : before.shape[2]] = before
    for rows, first, part in made:
        grown[rows, :, first : first + part.shape[2]] = part
    return grown
