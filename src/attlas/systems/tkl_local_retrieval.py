"""TKL: a long document is read in chunks and ranked by its best regions.

    e        = μ x + (1 − μ) Transformer(x + P)         query whole; document in chunks of 40 words, each
                                                        with 5 more on either side that are read along
    K_kij    = exp(−(cos(q_i, d_j) − μ_k)² / 2σ_k²)     how well word j answers query word i, by grades k
    t_wik    = Σ_{j in window w} K_kij                  windows of 30 words, one every 2
    s_wik    = a t^{1/b} − c,  (a, b, c) = W LayerNorm([v·q_i, words of w]) + 100
    score_w  = Σ_k α_k Σ_i s_wik
    score    = Σ_{best three w} Σ_{o in 0, ±1, ±2} β_{o,w} score_{w+o}

The saturation begins as 100 t^{1/100} − 100 ≈ ln t; `saturation="log"` keeps it at ln(κ_k t). A LayerNorm
of two numbers leaves little more than which is larger, as in the authors' code; places P begin anew
in every chunk there too, best windows lie at least 15 windows apart, and a document with room for
fewer counts some twice. Their code leaves up to four last words of a document unread; here all are read.

Trained by max(0, 1 − score⁺ + score⁻) on queries drawn from passages of the plays, which stand at any
depth of their documents. Score: 1 / rank of the relevant one. Tested on passages behind the first `first`
words; trivial baseline: query words counted among these. Word vectors are drawn and trained here, where
the paper begins with GloVe.

Shapes: query [batch terms dim], document [batch words dim] → scores [batch].
Cost: words · (chunk + 2 overlap) pairs, words · terms · kernels matches: memory linear in words.
Reduces to attention over the whole document with one chunk of its length.
Source: "Local Self-Attention over Long Text for Efficient Document Retrieval".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import relu

from attlas.bases.kernel_ranking import TERMS, LocalRanker, Shape
from attlas.catalog.registry import mechanism
from attlas.errors import UnknownName, UserError
from attlas.kinds.system import Example, System
from attlas.options import option
from attlas.tasks.retrieval import Candidates, Sizes, Words, candidates, ranks


@mechanism(
    "tkl-local-retrieval", paper="tkl-local-retrieval", aliases=("tkl",),
    example={"dim": 32, "heads": 2, "layers": 1, "ff": 32, "lengths": (240,), "first": 60,
             "questions": 12, "steps": 30, "batch": 8, "rate": 1e-3},
)  # fmt: skip
class TKL(Shape, System):
    """A ranker of long documents, trained and tested on passages of the plays."""

    title: ClassVar[str] = "reciprocal rank %"

    vocabulary: int = option("most frequent words, which have vectors", default=20000, at_least=1)
    lengths: tuple[int, ...] = option("words of the documents", default=(500, 1000, 2000), at_least=1)
    first: int = option(
        "words before a test's passage at least, and those that the baseline reads", default=200,
        at_least=0,
    )  # fmt: skip
    read: int = option("words of a document that are read; the rest is cut off", default=2000, at_least=1)
    passage: int = option("words of a passage", default=30, at_least=1)
    terms: int = option("words of a query", default=4, at_least=1, at_most=TERMS)
    documents: int = option("to rank for a query, one of which is relevant", default=10, at_least=2)
    questions: int = option("queries of each length", default=100, at_least=1)
    steps: int = option("of the optimiser", default=200, at_least=0)
    batch: int = option("pairs of a step", default=32, at_least=1)
    rate: float = option("learning rate, ten times that for the kernels' weights", default=1e-4, above=0)

    def setup(self) -> None:
        """Refuse options that make no documents.

        Raises:
            ValueError: naming what does not go together.
        """
        self.check_shape()
        if not self.lengths:
            raise UserError(f"lengths takes several, as lengths=(..., ), got {self.lengths!r}")
        for words in self.lengths:  # refuses those too short
            candidates(random.Random(0), self._sizes(words, 2), "test", self.first)

    def _sizes(self, words: int, documents: int) -> Sizes:
        return Sizes(words, self.passage, self.terms, documents)

    @property
    def cells(self) -> tuple[str, ...]:
        """The lengths."""
        return tuple(f"{words} words" for words in self.lengths)

    def data(self, cell: str, seed: int, split: str = "test") -> list[Example]:
        """Queries with their documents; a target is the relevant one's number, alone in a tuple."""
        if cell not in self.cells:
            raise UnknownName("cell", cell, self.cells)
        rng = random.Random(f"{seed}/{split}/{cell}")
        sizes = self._sizes(self.lengths[self.cells.index(cell)], self.documents)
        drawn = (candidates(rng, sizes, split, self.first) for _ in range(self.questions))
        return [Example(found, (relevant,)) for found, relevant in drawn]

    def _made(self, seed: int) -> nn.ModuleDict:
        """The network and its word vectors; the vector 0 is of words that have none."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            words = nn.Embedding(self.vocabulary + 1, self.dim, padding_idx=0)
            shape = {name: self.options[name] for name in LocalRanker.declared_options}
            return nn.ModuleDict({"words": words, "ranker": LocalRanker(**shape)})

    def fit(self, seed: int, tick: Callable[[float], None] = lambda share: None) -> None:
        """Train on pairs of a relevant document and another, whose passages stand at any depth."""
        self.net = self._made(seed)
        rng = random.Random(f"{seed}/train")
        named = dict(self.net.named_parameters())
        fast = named.pop("ranker.kernel_weights")
        adam = torch.optim.Adam([*named.values()], lr=self.rate)
        adam.add_param_group({"params": [fast], "lr": 10 * self.rate})
        for step in range(self.steps):
            sizes = self._sizes(rng.choice(self.lengths), 2)
            drawn = [candidates(rng, sizes, "train") for _ in range(self.batch)]
            queries = [pair.query for pair, _ in drawn]
            right, wrong = (
                self._scores(queries, [pair.documents[n ^ flip] for pair, n in drawn]) for flip in (0, 1)
            )
            adam.zero_grad()
            relu(1 - right + wrong).mean().backward()
            adam.step()
            tick((step + 1) / self.steps)
        self.net.eval()

    def _scores(self, queries: Sequence[Words], documents: Sequence[Words]) -> Float[Tensor, " batch"]:
        query, document = self._numbers(queries), self._numbers([d[: self.read] for d in documents])
        words, ranker = self.net["words"], self.net["ranker"]
        found: Tensor = ranker(words(query), words(document), query > 0, document > 0)
        return found

    def _numbers(self, texts: Sequence[Words]) -> Int[Tensor, "batch words"]:
        """Words as numbers; 0 is padding, and a word that has no vector."""
        known, last = ranks(), self.vocabulary
        numbers = [[rank + 1 if (rank := known.get(w, last)) < last else 0 for w in t] for t in texts]
        rows = [torch.tensor(n, dtype=torch.long) for n in numbers]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @torch.inference_mode()
    def predict(self, inputs: Sequence[Candidates]) -> list[tuple[int, ...]]:
        """The numbers of each query's documents, the best first."""
        _check(inputs)
        if getattr(self, "net", None) is None:
            raise UserError("the ranker is not trained yet: call fit")
        found = (self._scores([i.query] * len(i.documents), i.documents) for i in inputs)
        return [tuple(s.argsort(descending=True, stable=True).tolist()) for s in found]

    def guess(self, inputs: Sequence[Candidates], seed: int) -> list[tuple[int, ...]]:
        """By how many words of the first ones are the query's; equal ones as they are drawn."""
        _check(inputs)
        rng, found = random.Random(seed), []
        for one in inputs:
            counts = [sum(w in one.query for w in d[: self.first]) for d in one.documents]
            order = sorted(range(len(counts)), key=lambda n: (-counts[n], rng.random()))
            found.append(tuple(order))
        return found

    def score(self, said: Sequence[int], target: Sequence[int]) -> float:
        """1 / rank of the relevant document."""
        return 1 / (1 + list(said).index(target[0]))

    def state(self) -> dict[str, Tensor]:
        """The weights."""
        net = getattr(self, "net", None)
        return {} if net is None else dict(net.state_dict())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights."""
        self.net = self._made(0).eval()
        self.net.load_state_dict(state)


def _check(inputs: Sequence[object]) -> None:
    if not all(isinstance(one, Candidates) for one in inputs):
        raise UserError(f"inputs takes queries of `data`, got {[type(i).__name__ for i in inputs]}")
