"""Relevance patching: where a model that judges relevance keeps what it knows of a document.

    effect(layer, tokens) = (LD − LD_irrelevant) / (LD_relevant − LD_irrelevant)

of the prompt with an irrelevant document, in which what passes a point at these tokens is replaced by
what passes there with a relevant one: the residual stream, attention, the MLP or the heads' outputs.

    pointwise   Passage: … Query: … Is the passage relevant to the query? Answer:           → Yes or No
    pairwise    Passage A: … Passage B: … Query: … Which passage is relevant, A or B?        → A or B

Passages are of the plays, queries rare words of the relevant one that the other does not have. In the
corrupted twin another passage stands in the relevant one's place; or the two have changed places.

Cost: a run for each layer, point and group of tokens, and one for each head. The default groups are the
tokens that differ between the twins, those behind them, and the last one.

Source: "How do Large Language Models Understand Relevance? A Mechanistic Interpretability Perspective".
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inspect.prompts import Prompts, one_token
from attlas.inspect.runs import accuracy, by_layer, patched_heads, patched_points, without
from attlas.kinds.analysis import Analysis, Findings, Scores, Table
from attlas.options import option
from attlas.tasks.chat import tokens
from attlas.tasks.retrieval import COMMON, ranks
from attlas.tasks.text import passage

if TYPE_CHECKING:
    from attlas.inspect.subject import Subject

ASK = {
    "pointwise": "\nIs the passage relevant to the query? Answer Yes or No.\nAnswer:",
    "pairwise": "\nWhich passage is relevant to the query, A or B?\nAnswer:",
}
ANSWERS = {"pointwise": (" Yes", " No"), "pairwise": (" A", " B")}
POINTS = ("residual", "attention", "mlp")


def judgements(
    tokenizer: Any, count: int, way: Literal["pointwise", "pairwise"] = "pointwise", seed: int = 0,
    length: int = 40, query: int = 3,
) -> Prompts:  # fmt: skip
    """Prompts with a relevant document, and twins whose document is not.

    In half of the pairwise ones passage A is the relevant one of the clean prompt.

    Args:
        tokenizer: of the model.
        count: of pairs.
        way: of asking.
        seed: of passages and queries.
        length: of a passage, in tokens.
        query: its words, each of one token.

    Raises:
        ValueError: passages so short that they do not have so many rare words.
    """
    rng = random.Random(f"relevance {way} {seed}")
    answers = [one_token(word, tokenizer) for word in ANSWERS[way]]
    rows: list[tuple[list[int], list[int], list[int]]] = []
    for _ in range(count):
        relevant, other, words = _drawn(tokenizer, rng, length, query)
        asked = tokens(tokenizer, "\nQuery:" + "".join(f" {w}" for w in words) + ASK[way])
        if way == "pointwise":
            front = tokens(tokenizer, "Passage:\n")
            rows.append((front + relevant + asked, front + other + asked, answers))
            continue
        a, b = tokens(tokenizer, "Passage A:\n"), tokens(tokenizer, "\nPassage B:\n")
        first, second = a + relevant + b + other + asked, a + other + b + relevant + asked
        swapped = rng.random() < 0.5
        rows.append((second, first, answers[::-1]) if swapped else (first, second, answers))
    clean, corrupted, right = (torch.tensor(each) for each in zip(*rows, strict=True))
    return Prompts(clean, corrupted, right, f"relevance-{way}")


def _drawn(
    tokenizer: Any, rng: random.Random, length: int, query: int
) -> tuple[list[int], list[int], list[str]]:
    """(a relevant passage, another, words of the first that the second does not have)."""
    for _ in range(100):
        texts = [tokens(tokenizer, passage(rng, 12 * length))[:length] for _ in range(2)]
        said = [re.findall(r"[a-z]+", tokenizer.decode(ids)) for ids in texts]
        rare = [w for w in dict.fromkeys(said[0]) if ranks().get(w, 0) >= COMMON and w not in said[1]]
        rare = [w for w in rare if len(tokens(tokenizer, f" {w}")) == 1]
        if len(rare) >= query:
            chosen = set(rng.sample(rare, query))
            return texts[0], texts[1], [w for w in rare if w in chosen]
    raise UserError(
        f"length={length} tokens of a passage do not hold query={query} rare words of one token"
    )


def groups(prompts: Prompts) -> dict[str, tuple[int, ...]]:
    """Tokens by what they are: those that differ between twins, those behind them, the last one."""
    differ = (prompts.clean != prompts.corrupted).any(dim=0).nonzero().flatten().tolist()
    last = prompts.clean.shape[1] - 1
    if not differ or last in differ:
        raise UserError("prompts: the twins must differ, and end with the same token")
    behind = tuple(range(max(differ) + 1, last))
    found = {"document": tuple(differ), "behind": behind, "last": (last,)}
    return {name: each for name, each in found.items() if each}


@mechanism("relevance-patching", example={"ablated": 2})
class RelevancePatching(Analysis):
    """Maps what restores a judgement, by layer and tokens, and lists the heads that carry it.

    Give it `judgements` as prompts; any pairs of prompts will do.
    """

    needs = "prompts"

    each_token: bool = option("a map token by token, instead of by group", default=False)
    ablated: int = option(
        "the most causal heads that are taken out, beside as many others of the same layers; 0: none",
        default=5, at_least=0,
    )  # fmt: skip

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Effects of every point, of heads, and the accuracy without the best of them."""
        prompts = subject.prompts
        assert prompts is not None
        named = groups(prompts)
        wanted = None if self.each_token else list(named.values())
        maps: dict[str, Tensor] = {}
        for number, point in enumerate(POINTS):
            share = number / (len(POINTS) + 1)
            maps[point] = patched_points(
                subject.model, prompts, point, lambda x, s=share: tick(s + x / 4), wanted  # type: ignore[misc]
            )  # fmt: skip
        heads = patched_heads(subject.model, prompts, (-1,), lambda x: tick(0.75 + x / 4))
        told = Scores(heads, "share of the judgement that its output at the last token restores")
        tables = [self._accuracies(subject, told)] if self.ablated else []
        if not self.each_token:
            tables.insert(0, self._table(maps, list(named)))
        return Findings(heads={"relevance": told}, arrays=maps, tables=tables)

    @staticmethod
    def _table(maps: dict[str, Tensor], names: list[str]) -> Table:
        rows = [
            (point, layer, *(round(float(x), 4) for x in effects))
            for point, found in maps.items() for layer, effects in enumerate(found)
        ]  # fmt: skip
        return Table("Effect of a run with the relevant document", ("point", "layer", *names), rows)

    def _accuracies(self, subject: Subject, scores: Scores) -> Table:
        """Right judgements as the model is, without the most causal heads, and without others."""
        assert subject.prompts is not None
        best = scores.top(self.ablated)
        others = drawn_beside(best, subject.heads, subject.seed)
        rows = []
        for what, heads in (("none", []), ("the most causal", best), ("others, drawn", others)):
            right = accuracy(subject.model, subject.prompts, *without(by_layer(heads)))
            rows.append((what, len(heads), right))
        return Table("Right judgements with heads ablated", ("ablated", "heads", "right"), rows)


def drawn_beside(best: list[tuple[int, int]], heads: int, seed: int) -> list[tuple[int, int]]:
    """As many other heads, drawn from the same layers."""
    layers = sorted({layer for layer, _ in best})
    rest = [(x, h) for x in layers for h in range(heads) if (x, h) not in best]
    return random.Random(seed).sample(rest, min(len(rest), len(best)))
