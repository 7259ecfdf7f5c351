"""Does a ranker of passages read, or count words? Order is taken from what it is tuned and tested on.

    intact       w · encoder([CLS] query [SEP] passage [SEP])_[CLS], words and positions as they stand
    shuffled     words of the query and of the passage in random order among themselves
    permuted     positions 0 … n − 1 in random order over all tokens
    segments     every position 0: what is left of order is which segment a token is in
    BM25         Σ_w rarity(w) · tf (k + 1) / (tf + k): a bag of words

Without positions the encoder is a function of the multiset of (token, segment) pairs, so that the score
of [CLS] does not change when words move within a segment.

Shapes: [queries passages] scores. Cost: one fine-tuning for each kind of order.
Reduces to the intact ranker where nothing is shuffled.
Source: "The Role of Complex NLP in Transformers for Text Ranking?".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attlas.catalog.registry import mechanism
from attlas.kinds.study import Beats, NoWorse, Row, Study
from attlas.options import option
from attlas.tasks.passages import Sizes, index
from attlas.tasks.retrieval import Candidates

if TYPE_CHECKING:
    from attlas.bases.text_ranking import Places, TextRanker, Training, Writer

#: What a ranker is tuned and tested on: (whether words are shuffled, where positions stand).
ORDERS: dict[str, tuple[bool, Places]] = {
    "intact": (False, "intact"),
    "shuffled": (True, "intact"),
    "permuted": (False, "permuted"),
    "segments": (False, "none"),
}


@mechanism(
    "word-order-ranking",
    example={"model": "small", "steps": 2, "questions": 8, "batch": 2, "passages": 3},
)
class WordOrderRanking(Study):
    """A cross-encoder tuned and tested with and without the order of words."""

    claim = "a ranker that is tuned and tested on shuffled words keeps most of what the intact one finds"
    expects = (
        NoWorse("shuffled, tuned so", "intact", 0.1),
        Beats("shuffled, tuned so", "BM25"),
        NoWorse("segments, tuned so", "intact", 0.1),
    )

    model: str = option("an encoder that `attlas.load` takes, or small: random weights", default="minilm")
    steps: int = option("of a fine-tuning", default=1000, at_least=1)
    batch: int = option("queries of a step", default=16, at_least=1)
    candidates: int = option("passages of a query in tuning", default=4, at_least=2)
    passages: int = option("passages to rank for a query of the held-out plays", default=10, at_least=2)
    questions: int = option("such queries", default=200, at_least=1)
    words: int = option("of a passage", default=16, at_least=4)
    rate: float = option("AdamW's learning rate", default=1e-4, above=0)

    @property
    def set_up(self) -> str:
        """What is ranked, by what, after what training."""
        return (
            f"MRR of 1 among {self.passages} passages of {self.words} words, {self.questions} queries of "
            f"held-out plays; {self.model} tuned in {self.steps} steps of {self.batch} queries"
        )

    def run(self, seed: int) -> Iterator[Row]:
        """The intact ranker with each order at test, rankers tuned so, and BM25."""
        from attlas.bases.text_ranking import Training, mean_reciprocal_rank, questions

        sizes = Sizes(self.words)
        how = Training(self.steps, self.batch, self.candidates, self.rate, sizes)
        asked = questions(seed, self.questions, sizes, self.passages)
        known = index("test", self.words)

        def bm25(some: Sequence[Candidates]) -> Tensor:
            return torch.tensor([[known.bm25(o.query, p) for p in o.documents] for o in some])

        yield Row("BM25", 100 * mean_reciprocal_rank(asked, bm25), " %")
        for name in ORDERS:
            ranker, writer = self._tuned(name, how, seed)
            for tested in ORDERS if name == "intact" else (name,):
                found = mean_reciprocal_rank(asked, _ordered(ranker, writer, tested, seed))
                told = "" if tested == "intact" else ", tuned so" if tested == name else ", not tuned so"
                yield Row(tested + told, 100 * found, " %")

    def _tuned(self, order: str, how: Training, seed: int) -> tuple[TextRanker, Writer]:
        """A ranker that knows one kind of order; all begin with the same weights."""
        from attlas.bases.text_ranking import TextRanker, encoder, fine_tune

        torch.manual_seed(seed)
        model, writer = encoder(self.model)
        shuffle, places = ORDERS[order]
        ranker = TextRanker(model).to(self.device)
        return fine_tune(ranker, writer, how, seed, places, shuffle), writer


def _ordered(
    ranker: TextRanker, writer: Writer, order: str, seed: int
) -> Callable[[Sequence[Candidates]], Tensor]:
    from attlas.bases.text_ranking import shuffled

    shuffle, places = ORDERS[order]
    rng = random.Random(f"{seed}/order")

    def scores(some: Sequence[Candidates]) -> Tensor:
        some = [shuffled(one, rng) if shuffle else one for one in some]
        found: Tensor = ranker(writer, some, places)
        return found

    return scores
