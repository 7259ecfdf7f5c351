"""Quest: of the keys' pages, read those that could hold a large logit for this query.

    low, high = elementwise minimum and maximum over a page's keys
    bound(q, page) = Σ_d max(q_d · low_d, q_d · high_d)  ≥  q · k    for every key k of the page
    read           = the pages of largest bound, and all tokens that do not fill a page yet

Pages are cut over each row's own tokens. A page once packed is summarised once. Heads of a group read
common pages, by the largest of their bounds, so that a page's keys are read once for the group; with
`shared=False` each query head has its own, which is the authors' code (it repeats keys first).

Cost: two vectors a page are held and read, 1/page of the keys and values together; then the chosen
pages. Reads all pages, hence reduces to full attention, at keep = 1.

Source: "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", in whose code the page
of the newest token competes with the others instead of being always read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from attlas.attach.call import Call
from attlas.cache.selection import PortionSelection, keys_of, lengths_of
from attlas.cache.summaries import Portion, best_portion, extend
from attlas.catalog.registry import mechanism
from attlas.errors import exactly_one
from attlas.ops.pages import page_bounds, page_scores
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import Chosen, LayerState

#: Pages that the authors read at least when the budget is one of tokens.
LEAST_PAGES = 3


@mechanism(
    "quest-page-selection", aliases=("quest",), example={"keep": 0.5, "page": 4, "dense_layers": ()}
)
class Quest(PortionSelection):
    """Read the pages whose bound is largest."""

    everything: ClassVar[dict[str, Any]] = {"keep": 1.0}
    chooses_on_device: ClassVar[bool] = True
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.25)", "(keep=0.125)")

    tokens: int | None = option(
        "or a budget of tokens: tokens // page pages, three at least", default=None, at_least=1
    )
    pages: int | None = option("or a number of pages", default=None, at_least=1)
    page: int = option("tokens of a page", default=16, at_least=1)
    dense_layers: Sequence[int] = option(
        "layers that read everything; the paper's first two", default=(0, 1), at_least=0
    )
    shared: bool = option("query heads of a group read common pages", default=True)

    def asked(self) -> Portion:
        """A share, or a number of pages."""
        exactly_one("a selection", keep=self.keep, tokens=self.tokens, pages=self.pages)
        if self.tokens is not None:
            return Portion(pages=max(LEAST_PAGES, self.tokens // self.page))
        return Portion(self.keep, self.pages)

    def summarize(self, state: LayerState, body: Body) -> None:
        """Minimum and maximum of the keys of each new page."""

        def bounds(rows: slice, start: int, stop: int) -> dict[str, Tensor]:
            low, high = page_bounds(keys_of(body, start, stop)[rows], self.page)
            return {"low": low, "high": high}

        if state.layer not in self.dense_layers:
            extend(state, body, self.page, ("low", "high"), bounds)

    def choose(self, state: LayerState, body: Body, call: Call) -> Chosen | None:
        """The pages of largest bound."""
        low, high = state.tensors["low"], state.tensors["high"]
        scores = page_scores(call.q, low, high, shared=self.shared)
        index = best_portion(scores, self.portion, lengths_of(body), self.page)
        return Chosen(index, self.page, body.slots, scored=2 * low.nbytes)
