"""MAPS: what a head maps tokens to, read off its weights; no text is run.

    M_h = f(E) N W_V,h W_O,h N' U                        [vocabulary, vocabulary], never made whole
    relation(h)    share of pairs (s, t) with t among the k largest of row s of M_h
    suppressed(h)  the same of −M_h
    salience(s)    ‖f(e_s) N W_V,h W_O,h‖ / ‖f(e_s)‖

E are the embeddings, U the unembedding, N and N' the gains of the norms in front of the attention and
of the unembedding; sizes that a text decides are left out. f is the model's first MLP behind its norm,
nothing added, and the identity in layer 0 or with `mlp=False`.

Cost: each head's rows for the sources alone, O(pairs · width · vocabulary), and for the salient tokens
of a head one pass over the vocabulary, O(vocabulary · width · (mlp width + dim)).

Source: "Inferring Functionality of Attention Heads from their Parameters".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inspect.blocks import pieces_of
from attlas.inspect.readout import Readout, gained, readout
from attlas.inspect.runs import kept
from attlas.inspect.subject import Subject
from attlas.inspect.weights import head_weights
from attlas.kinds.analysis import Analysis, Findings, Scores, Table
from attlas.options import option

Relation = Sequence[tuple[str, str]]

_WORDS = (
    "apple bread cloud dance earth flame green house image juice knife light money night ocean paper "
    "queen river stone table uncle voice water youth zebra animal bridge castle doctor engine"
)
_CAPITALS = (
    "France Paris Germany Berlin Italy Rome Spain Madrid Russia Moscow "
    "China Beijing Japan Tokyo England London Ireland Dublin Austria Vienna "
    "Greece Athens Egypt Cairo Cuba Havana Peru Lima Kenya Nairobi "
    "Norway Oslo Sweden Stockholm Poland Warsaw Portugal Lisbon Iraq Baghdad "
    "Iran Tehran"
)
#: Pairs of words that are looked for where a tokenizer is given.
RELATIONS: Mapping[str, Relation] = {
    "first letter": [(word, word[0]) for word in _WORDS.split()],
    "capital": list(zip(_CAPITALS.split()[::2], _CAPITALS.split()[1::2], strict=True)),
}
#: Tokens that are worked on at once where all of the vocabulary is.
CHUNK = 8192


@dataclass(frozen=True)
class Reading:
    """What is needed to read a model's heads.

    Attributes:
        model: whose weights are read.
        out: its last norm and unembedding.
        mlp: whether embeddings pass the first MLP.
    """

    model: nn.Module
    out: Readout
    mlp: bool = True

    def sources(self, layer: int, ids: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """f(E) of some tokens, as a layer is given them."""
        model: Any = self.model
        e: Tensor = model.get_input_embeddings()(ids)
        if self.mlp and layer:
            pieces = pieces_of(model, 0)
            e = pieces.mlp_norm(e)
            for module in pieces.mlp:
                e = module(e)
        return e

    def logits(
        self, layer: int, head: int, x: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n vocabulary"]:
        """Rows of M_h: x N W_V W_O N' U, multiplied in the cheapest order."""
        v, o = self._values(layer, head, x)
        found: Tensor = torch.linalg.multi_dot([v, gained(self.out.norm, o), self.out.weight])
        return found

    def written(
        self, layer: int, head: int, x: Float[Tensor, "n width"]
    ) -> Float[Tensor, "n width"]:
        """x N W_V W_O."""
        v, o = self._values(layer, head, x)
        return v @ o

    def _values(self, layer: int, head: int, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = head_weights(self.model, layer)
        return gained(pieces_of(self.model, layer).attention_norm, x) @ weights.v[head], weights.o[head]


def ranks(
    logits: Float[Tensor, "n vocabulary"], targets: Int[Tensor, " n"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """(how many are larger than each target, how many smaller)."""
    own = logits.gather(1, targets[:, None])
    return (logits > own).sum(1), (logits < own).sum(1)


def scored(
    reading: Reading, layer: int, x: Float[Tensor, "n width"], targets: Int[Tensor, " n"]
) -> Int[Tensor, "2 heads n"]:
    """The ranks of each source's target, from the top and from the bottom, in each head of a layer."""
    heads = range(len(head_weights(reading.model, layer).v))
    found = [torch.stack(ranks(reading.logits(layer, head, x), targets)) for head in heads]
    return torch.stack(found, dim=1)


@dataclass(frozen=True)
class Salient:
    """Tokens that a head writes most for.

    Attributes:
        tokens: the most salient first.
        amplification: of each.
        mappings: the tokens that each is mapped to most, [tokens, mappings].
    """

    tokens: Int[Tensor, " n"]
    amplification: Float[Tensor, " n"]
    mappings: Int[Tensor, "n mappings"]


def salient(reading: Reading, layer: int, head: int, tokens: int, mappings: int) -> Salient:
    """The tokens of all the vocabulary whose norm grows most in a head, and what it maps them to."""
    model: Any = reading.model
    ids = torch.arange(model.get_input_embeddings().weight.shape[0], device=reading.out.weight.device)
    found = []
    for part in ids.split(CHUNK):
        x = reading.sources(layer, part)
        found.append(reading.written(layer, head, x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-30))
    best = torch.cat(found).topk(tokens)
    logits = reading.logits(layer, head, reading.sources(layer, best.indices))
    return Salient(best.indices, best.values, logits.topk(mappings).indices)


def spelled_pairs(relation: Relation, tokenizer: Any) -> Int[Tensor, "n 2"]:
    """Pairs of words as tokens; those that a tokenizer spells in several are left out."""
    spelled = ([tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in p] for p in relation)
    found = [[ids[0] for ids in pair] for pair in spelled if all(len(ids) == 1 for ids in pair)]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2)


@mechanism("maps-head-parameters", paper="maps-head-parameters")
class MapsHeadParameters(Analysis):
    """Which relations between tokens the weights of each head hold, and what it writes most for."""

    needs = "weights"
    inspects = "weights"

    relations: Mapping[str, Relation] | None = option(
        "pairs of words by name; first letters and capitals unless given", default=None, kw_only=False,
    )  # fmt: skip
    top: int = option("k: among so many a target must be", default=10, at_least=1)
    mlp: bool = option("whether embeddings pass the first MLP", default=True)
    copied: int = option(
        "tokens that are looked at for copying, k = 1; 0 for none", default=128, at_least=0
    )
    tokens: int = option("salient tokens that are told of the best head", default=8, at_least=1)
    mappings: int = option("what each is mapped to, that many", default=4, at_least=1)

    def check(self, subject: Subject) -> None:
        """Refuse words without a tokenizer, and a model whose heads or unembedding are not known."""
        if self.relations and subject.tokenizer is None:
            raise UserError("relations are in words: give the model's tokenizer, Subject(tokenizer=...)")
        readout(subject.model)
        for layer in range(subject.layers):
            head_weights(subject.model, layer)
            pieces_of(subject.model, layer)

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Scores of relations and of copying, and the salient tokens of the best heads."""
        reading = Reading(subject.model, readout(subject.model), self.mlp)
        named = self._pairs(subject)
        joined = torch.cat([pairs for pairs, _ in named.values()]).to(subject.device)
        sizes = [len(pairs) for pairs, _ in named.values()]
        above = []
        for layer in range(subject.layers):
            x = reading.sources(layer, joined[:, 0])
            above.append(scored(reading, layer, x, joined[:, 1]))
            tick((layer + 1) / (subject.layers + 1))
        by_name = torch.stack(above).split(sizes, dim=-1)  # [layers, 2, heads, pairs]
        heads, rows = dict[str, Scores](), []
        for (name, (_, top)), found in zip(named.items(), by_name, strict=True):
            share = (found < top).double().mean(dim=-1)
            told = f"of {found.shape[-1]} pairs, the share whose target is among the {top}"
            heads[name] = Scores(share[:, 0], f"{told} that the head raises most")
            heads[f"{name} suppressed"] = Scores(share[:, 1], f"{told} that the head lowers most")
            rows += self._rows(reading, name, heads[name].top(1)[0], subject.tokenizer)
        tick(1.0)
        columns = ("relation", "layer", "head", "token", "amplification", "mapped to")
        return Findings(heads=heads, tables=[Table("What the best heads write most for", columns, rows)])

    def _pairs(self, subject: Subject) -> dict[str, tuple[Tensor, int]]:
        """(token pairs, k) of each relation that has any."""
        words = RELATIONS if self.relations is None else self.relations
        found = {}
        if self.copied:
            size = len(readout(subject.model).bias)
            ids = torch.randperm(size)[: self.copied]
            found["copying"] = (torch.stack([ids, ids], dim=1), 1)
        if subject.tokenizer is not None:
            spelled = {name: spelled_pairs(pairs, subject.tokenizer) for name, pairs in words.items()}
            found |= {name: (pairs, self.top) for name, pairs in spelled.items() if len(pairs)}
        if not found:
            raise UserError("relations has no pair of words that are one token each")
        return found

    def _rows(
        self, reading: Reading, name: str, at: tuple[int, int], tokenizer: Any
    ) -> list[tuple[Any, ...]]:
        size = reading.out.weight.shape[1]
        found = salient(reading, *at, min(self.tokens, size), min(self.mappings, size))
        say: Callable[[int], str] = str if tokenizer is None else lambda i: tokenizer.decode([i])
        columns = (found.tokens, found.amplification, found.mappings)
        told = zip(*(each.tolist() for each in columns), strict=True)
        return [(name, *at, say(i), much, " ".join(map(say, to))) for i, much, to in told]


def seen_at_work(
    subject: Subject, pairs: Relation, top: int, prompt: str = "This is a document about {}"
) -> Float[Tensor, "layers heads"]:
    """The relation's score from what heads give at inference: their output at the source, the last token
    of a prompt, through the unembedding. Words of several tokens are left out."""
    ids = spelled_pairs(pairs, subject.tokenizer).to(subject.device)
    start = subject.tokenizer(prompt.format("").rstrip(), return_tensors="pt")["input_ids"].to(ids)
    prompts = torch.cat([start.expand(len(ids), -1), ids[:, :1]], dim=1)
    given = kept(subject.model, prompts, ("heads",)).passed["heads"][:, :, -1]
    out, found = readout(subject.model), []
    for layer, each in enumerate(given):
        written = torch.einsum("nhd,hdw->hnw", each, head_weights(subject.model, layer).o)
        found.append([
            (ranks(gained(out.norm, x) @ out.weight, ids[:, 1])[0] < top).double().mean() for x in written
        ])  # fmt: skip
    return torch.tensor(found, dtype=torch.float64)
