"""Rankers of passages on a pretrained encoder such as MiniLM, and how they are fine-tuned.

    cross    score = w · encoder([CLS] query [SEP] passage [SEP])_[CLS] + b
    bi       score = cos(mean of encoder([CLS] query [SEP]), mean of encoder([CLS] passage [SEP])) / τ
    kernels  score = Σ_k w_k Σ_i ln Σ_j exp(−(cos(q_i, p_j) − μ_k)² / 2σ_k²)
    loss     −ln softmax(scores of a query's passages)[relevant]

The kernels compare word vectors alone. Order is taken from a cross-encoder in its input, words of the
query and of the passage shuffled among themselves; or in its positions, which stand in another order,
or are all 0.

Tokens are of five types: padding, markers ([CLS], [SEP]), the query's, stop-words and content words
of the passage. A type that is removed is seen by no token; [CLS], where the score is read, still asks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas import ops
from attlas.hf.models import AutoModel, config_class
from attlas.tasks.passages import Sizes, draw, reciprocal_rank
from attlas.tasks.retrieval import COMMON, Candidates, Words, ranks

Kind = Literal["cross", "bi", "kernels"]
Places = Literal["intact", "permuted", "none"]
#: Types of tokens, by number.
PADDING, MARKER, QUERY, STOP, CONTENT = range(5)
#: Temperature of the bi-encoder's cosines; centres and widths of the kernels.
TEMPERATURE = 0.05
CENTRES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)
WIDTHS = (1e-3, *(0.1,) * 10)


#: As queries and passages are unless told otherwise.
SIZES = Sizes()


class Pairs(NamedTuple):
    """Queries with passages as an encoder reads them.

    Attributes:
        ids: of the tokens; 0 behind the end.
        segments: 0 up to the query's [SEP], 1 behind it.
        types: as above.
        matches: the tokens of the passage whose word is the query's, and the query's own.
    """

    ids: Int[Tensor, "rows tokens"]
    segments: Int[Tensor, "rows tokens"]
    types: Int[Tensor, "rows tokens"]
    matches: Bool[Tensor, "rows tokens"]


class Writer:
    """Makes tokens of words, with a model's tokenizer or, without one, a token a word."""

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.cls: int
        self.sep: int
        self.cls, self.sep = (1, 2) if tokenizer is None else (
            tokenizer.cls_token_id, tokenizer.sep_token_id
        )  # fmt: skip

    def tokens(self, word: str) -> list[int]:
        """The tokens of a word."""
        if word not in self._known:
            self._known[word] = (
                [3 + ranks()[word] % 500]
                if self.tokenizer is None
                else self.tokenizer(word, add_special_tokens=False)["input_ids"]
            )
        return self._known[word]

    def pairs(self, texts: Sequence[tuple[Words, Words | None]]) -> Pairs:
        """[CLS] query [SEP] passage [SEP] of each, or [CLS] text [SEP] of a text alone."""
        rows = [self._row(*pair) for pair in texts]
        columns = zip(*rows, strict=True)
        padded = [
            nn.utils.rnn.pad_sequence([torch.tensor(row) for row in column], batch_first=True)
            for column in columns
        ]
        return Pairs(padded[0], padded[1], padded[2], padded[3].bool())

    def _row(self, query: Words, passage: Words | None) -> tuple[list[int], ...]:
        shared = set(query) & set(passage or ())
        said = [(self.cls, 0, MARKER, False)]
        said += [(t, 0, QUERY, word in shared) for word in query for t in self.tokens(word)]
        said.append((self.sep, 0, MARKER, False))
        for word in passage or ():
            kind = STOP if ranks()[word] < COMMON else CONTENT
            said += [(t, 1, kind, word in shared) for t in self.tokens(word)]
        if passage is not None:
            said.append((self.sep, 1, MARKER, False))
        return tuple(list(column) for column in zip(*said, strict=True))


class TextRanker(nn.Module):
    """A ranker of one of the three kinds.

    Args:
        encoder: a BERT, which is changed in training.
        kind: how query and passage meet.
    """

    def __init__(self, encoder: nn.Module, kind: Kind = "cross") -> None:
        super().__init__()
        self.encoder, self.kind = encoder, kind
        width = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        if kind == "kernels":
            self.encoder = encoder.get_input_embeddings()  # type: ignore[operator]
        if kind != "bi":
            self.head = nn.Linear(len(CENTRES) if kind == "kernels" else width, 1)
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def cross(
        self, pairs: Pairs, seen: Bool[Tensor, "rows tokens"] | None = None, places: Places = "intact"
    ) -> Float[Tensor, " rows"]:
        """The scores of pairs.

        Args:
            pairs: to score.
            seen: the tokens that others attend to; all but padding unless given.
            places: whether positions are as they stand, in another order, or all 0.
        """
        there = pairs.types != PADDING
        at = torch.arange(there.shape[1], device=there.device).expand_as(there)
        if places == "none":
            at = torch.zeros_like(at)
        elif places == "permuted":
            at = permuted(there)
        states = self.encoder(
            input_ids=pairs.ids, token_type_ids=pairs.segments, position_ids=at,
            attention_mask=(there if seen is None else seen & there).long(),
        ).last_hidden_state  # fmt: skip
        scores: Tensor = self.head(states[:, 0])[:, 0]
        return scores

    def texts(self, pairs: Pairs) -> Float[Tensor, "rows width"]:
        """The vectors of texts alone: the mean of their tokens' last states, of norm 1."""
        there = (pairs.types != PADDING).long()
        states = self.encoder(input_ids=pairs.ids, attention_mask=there).last_hidden_state
        mean = (states * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return ops.unit(mean, 1e-12)

    def kernels(self, pairs: Pairs) -> Float[Tensor, " rows"]:
        """The scores of pairs by their word vectors."""
        vectors = ops.unit(self.encoder(pairs.ids), 1e-12)
        cosine = (vectors @ vectors.mT)[..., None]
        centres, widths = (torch.tensor(x, device=cosine.device) for x in (CENTRES, WIDTHS))
        query = pairs.types == QUERY
        passage = (pairs.types == STOP) | (pairs.types == CONTENT)
        near = torch.exp(-(((cosine - centres) / widths) ** 2) / 2) * passage[:, None, :, None]
        counts = near.sum(2).clamp(min=1e-10).log() * query[..., None] * 0.01
        scores: Tensor = self.head(counts.sum(1))[:, 0]
        return scores

    def forward(
        self, writer: Writer, some: Sequence[Candidates], places: Places = "intact"
    ) -> Float[Tensor, "queries passages"]:
        """The scores of the passages of queries that have equally many."""
        device = next(self.parameters()).device
        pairs = [(one.query, passage) for one in some for passage in one.documents]
        if self.kind != "bi":
            written = on(writer.pairs(pairs), device)
            found = self.kernels(written) if self.kind == "kernels" else self.cross(written, None, places)
            grid: Tensor = found.unflatten(0, (len(some), -1))
            return grid
        queries = self.texts(on(writer.pairs([(one.query, None) for one in some]), device))
        passages = self.texts(on(writer.pairs([(passage, None) for _, passage in pairs]), device))
        products: Tensor = passages.unflatten(0, (len(some), -1)) @ queries[..., None]
        return products[..., 0] / TEMPERATURE


def on(pairs: Pairs, device: torch.device) -> Pairs:
    """The pairs on a device."""
    return Pairs(*(tensor.to(device) for tensor in pairs))


def permuted(there: Bool[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
    """The positions of each row's tokens in random order; padding keeps its own."""
    places = torch.arange(there.shape[1], device=there.device)
    drawn = torch.rand(there.shape, device=there.device).masked_fill(~there, 2)
    order = drawn.argsort(dim=1, stable=True)
    # The tokens that are there come first in `order`; the k-th of them takes the k-th place.
    return torch.empty_like(order).scatter_(1, order, places.expand_as(order))


def shuffled(one: Candidates, rng: random.Random) -> Candidates:
    """The words of the query and of each passage in another order."""

    def again(words: Words) -> Words:
        return tuple(rng.sample(words, len(words)))

    return Candidates(again(one.query), tuple(again(passage) for passage in one.documents))


@dataclass(frozen=True)
class Training:
    """How a ranker is fine-tuned: by AdamW, its rate warmed up, then falling to 0 along a line."""

    steps: int = 300
    batch: int = 8
    passages: int = 4
    rate: float = 1e-4
    sizes: Sizes = SIZES


def small_encoder() -> Any:
    """A BERT with random weights that reads a word a token, for tests."""
    config = config_class("BertConfig")(
        vocab_size=503, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )  # fmt: skip
    return AutoModel.from_config(config).eval()


def encoder(model: str) -> tuple[Any, Writer]:
    """(the encoder called `model`, what writes its texts); "small" is one for tests."""
    from attlas.models.load import load, load_tokenizer

    if model == "small":
        return small_encoder(), Writer()
    return load(model), Writer(load_tokenizer(model))


def fine_tune(
    ranker: TextRanker, writer: Writer, how: Training, seed: int, places: Places = "intact",
    shuffle: bool = False, tick: Callable[[int, float], None] = lambda step, loss: None,
) -> TextRanker:  # fmt: skip
    """Train a ranker on queries of the training plays; it comes back in evaluation mode.

    Args:
        ranker: is changed.
        writer: of its encoder.
        how: steps, batch and rate.
        seed: of the queries, and of their order where they are shuffled.
        places: as the ranker is to know them.
        shuffle: whether words stand in random order.
        tick: told each step's number and loss.
    """
    rng = random.Random(f"{seed}/train")
    # The head is new: it learns faster than the encoder, which knows much already.
    new = [weight for name, weight in ranker.named_parameters() if name.startswith("head")]
    old = [weight for name, weight in ranker.named_parameters() if not name.startswith("head")]
    groups: list[dict[str, Any]] = [{"params": old}, {"params": new, "lr": 10 * how.rate}]
    adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=how.rate)
    warm = max(1, how.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / warm, (how.steps - step) / max(1, how.steps - warm))
    )
    ranker.train()
    for step in range(how.steps):
        drawn = [draw(rng, how.sizes, "train", how.passages) for _ in range(how.batch)]
        some = [shuffled(one, rng) if shuffle else one for one, _ in drawn]
        scores = ranker(writer, some, places)
        answers = torch.tensor([number for _, number in drawn], device=scores.device)
        loss = nn.functional.cross_entropy(scores, answers)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(ranker.parameters(), 1.0)
        adam.step()
        schedule.step()
        tick(step, float(loss.detach()))
    return ranker.eval()


def questions(seed: int, count: int, sizes: Sizes, passages: int) -> list[tuple[Candidates, int]]:
    """Queries of the held-out plays."""
    rng = random.Random(f"{seed}/test")
    return [draw(rng, sizes, "test", passages) for _ in range(count)]


def mean_reciprocal_rank(
    asked: Sequence[tuple[Candidates, int]], scores: Callable[[Sequence[Candidates]], Tensor]
) -> float:
    """MRR in [0, 1] of what gives [queries passages], asked eight queries at a time."""
    found = []
    for at in range(0, len(asked), 8):
        some = asked[at : at + 8]
        with torch.inference_mode():
            rows = scores([one for one, _ in some]).tolist()
        found += [reciprocal_rank(row, number) for row, (_, number) in zip(rows, some, strict=True)]
    return sum(found) / len(found)
