"""Path patching: what a head says to later heads, or to the logits, and nothing else.

    1. clean prompt, last token: z of the sender is the corrupted run's, z of all other heads the clean
       run's; what reaches the receiver is kept             (its q, k or v, or the residual stream)
    2. clean prompt, last token: the receiver is given that
    effect = (LD − LD_clean) / (LD_corrupted − LD_clean)        LD = logit(right) − logit(wrong)

MLPs answer to the sender, or are frozen too (`freeze_mlps`). With the logits as the receiver the first
run tells. Two circuits found so are laid over each other by `overlap`; `forced` makes chosen heads attend
where they are told, as the paper edits heads that look at the wrong things.

Cost: the prompts but for their last token are read once; then one step of one token a layer, all its
heads side by side in the batch, twice where the receiver is not the logits.
Reduces to the effect 0 where both prompts are the same, and to 1 where all heads send and the logits
receive, of prompts that end in the same token.

Source: "Circuit Component Reuse Across Tasks in Transformer Language Models".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.attach import attach
from attlas.attach.part import Part
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.inspect.prompts import Prompts, logit_difference
from attlas.inspect.runs import by_layer
from attlas.inspect.subject import Subject
from attlas.kinds.analysis import Analysis, Findings, Needs, Scores
from attlas.options import option
from attlas.parts.patch.replace import Replace, ReplacePattern
from attlas.parts.record.activations import Activations

Head: TypeAlias = tuple[int, int]
LAST = (-1,)
#: Edges that are told for the drawing of a circuit.
EDGES = 24


@mechanism("path-patching", paper="circuit-reuse")
class PathPatching(Analysis):
    """The effect of each head on the logit difference, through receivers alone."""

    needs: ClassVar[Needs] = "prompts"
    inspects = "circuits"

    receivers: tuple[Head, ...] | None = option(
        "(layer, head) that are sent to, or layers' (layer, -1) with through='residual'; the logits "
        "unless given", default=None,
    )  # fmt: skip
    through: Literal["q", "k", "v", "heads", "residual"] = option(
        "what of the receivers is changed: queries, keys, values, outputs, or what enters the layer",
        default="q",
    )
    freeze_mlps: bool = option("whether MLPs say what they said in the clean run", default=False)

    def setup(self) -> None:
        """Refuse an empty list of receivers."""
        super().setup()
        if self.receivers is not None and not self.receivers:
            raise UserError("receivers names none; give None for the logits")

    def check(self, subject: Subject) -> None:
        """Refuse receivers that the model does not have, and prompts of one token."""
        for layer, head in self.receivers or ():
            whole = self.through == "residual"
            if not 0 <= layer < subject.layers or not (whole or 0 <= head < subject.heads):
                raise UserError(
                    f"receivers names layer {layer}, head {head}; the model has {subject.layers} layers "
                    f"of {subject.heads} heads"
                )
        assert subject.prompts is not None
        if subject.prompts.clean.shape[1] < 2:
            raise UserError("path patching needs prompts of at least two tokens")

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """One layer of senders at a time."""
        assert subject.prompts is not None
        paths = Paths(
            subject.model, subject.prompts.to(subject.device), self.receivers, self.through,
            self.freeze_mlps,
        )  # fmt: skip
        found = torch.zeros(subject.layers, subject.heads, dtype=torch.float64, device=subject.device)
        end = subject.layers if self.receivers is None else max(layer for layer, _ in self.receivers)
        for layer in range(end):
            found[layer] = paths.effects([[(layer, head)] for head in range(subject.heads)])
            tick((layer + 1) / end)
        for layer, head in self.receivers or ():
            if head >= 0:
                found[layer, head] = 0.0  # a receiver is not its own sender
        scores = Scores(found, "swapping what this head says moves the answer by this share")
        return Findings(heads={"path effect": scores}, arrays={"circuit": self._edges(scores, subject)})

    def _edges(self, scores: Scores, subject: Subject) -> Float[Tensor, "edges 5"]:
        """The strongest edges, to each of the receivers."""
        strongest = Scores(scores.values.abs(), scores.meaning).top(EDGES)
        ends = [(subject.layers, -1)] if self.receivers is None else list(self.receivers)
        rows = [
            (*sender, *end, float(scores.values[sender]))
            for sender in strongest for end in ends if scores.values[sender] != 0
        ]  # fmt: skip
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)


class Paths:
    """Prompts that were read up to their last token, and what each run says at it.

    Args:
        model: with its head.
        prompts: on the model's device.
        receivers: see `PathPatching`.
        through: likewise.
        freeze_mlps: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Prompts,
        receivers: Sequence[Head] | None,
        through: str,
        freeze_mlps: bool,
    ) -> None:
        self.model, self.prompts, self.through = model, prompts, through
        self.receivers = receivers
        points = ("heads", "mlp") if freeze_mlps else ("heads",)
        self.cache = read(model, prompts.clean[:, :-1])
        clean, corrupted = Activations(points), Activations(points)
        step = prompts.clean[:, -1:]
        self.clean = self._answers(last(model, self.cache, step, clean)).mean()
        other = last(model, read(model, prompts.corrupted[:, :-1]), prompts.corrupted[:, -1:], corrupted)
        self.corrupted = self._answers(other).mean()
        self.said, self.swapped = clean.result(), corrupted.result()
        self._unmoved: dict[int, Tensor] = {}

    def effects(self, senders: Sequence[Sequence[Head]]) -> Float[Tensor, " sets"]:
        """The effect of each set of senders, its heads swapped together.

        Raises:
            ValueError: both prompts give the same logit difference, and yet something changed.
        """
        count = len(senders)
        mixed = self.said["heads"].repeat_interleave(count, dim=1)
        if count not in self._unmoved:  # by the same steps, so that nothing changed is 0 to the bit
            self._unmoved[count] = self._score(mixed, count)
        for number, heads in enumerate(senders):
            for layer, head in heads:
                mixed[layer, number::count, :, head] = self.swapped["heads"][layer, :, :, head]
        moved = self._score(mixed, count) - self._unmoved[count]
        room = (self.corrupted - self.clean).double()
        if room == 0 and bool((moved != 0).any()):
            raise UserError(
                "clean and corrupted prompts give the same logit difference; take other prompts"
            )
        return torch.where(moved == 0, 0.0, moved / room)

    def _score(self, heads: Tensor, count: int) -> Float[Tensor, " sets"]:
        """The mean logit difference of each set, its heads' outputs given."""
        cache = repeated(self.cache, count)
        step = self.prompts.clean[:, -1:].repeat_interleave(count, dim=0)
        parts: list[Part] = [Replace({"heads": heads}, positions=LAST)]
        if "mlp" in self.said:
            mlp = self.said["mlp"].repeat_interleave(count, dim=1)
            parts.append(Replace({"mlp": mlp}, positions=LAST))
        if self.receivers is not None:
            heard = Activations((self.through,))
            last(self.model, cache, step, heard, *parts)  # it listens before heads are frozen
            parts = [self._given(heard.result()[self.through])]
        logits = last(self.model, cache, step, *parts)
        differences: Tensor = self._answers(logits, count).double().unflatten(0, (-1, count))
        return differences.mean(0)

    def _given(self, heard: Tensor) -> Part:
        assert self.receivers is not None
        if self.through == "residual":
            return Replace({"residual": heard}, layers=[layer for layer, _ in self.receivers])
        return Replace({self.through: heard}, heads=by_layer(self.receivers), positions=LAST)

    def _answers(self, logits: Tensor, count: int = 1) -> Float[Tensor, " rows"]:
        return logit_difference(logits, self.prompts.answers.repeat_interleave(count, dim=0))


def read(model: Any, ids: Int[Tensor, "rows tokens"]) -> Any:
    """The cache behind some tokens."""
    with torch.no_grad():
        return cache_of(model(input_ids=ids, use_cache=True))


def repeated(cache: Any, count: int) -> Any:
    """A cache whose every row stands `count` times, one after the other."""
    many = copy.deepcopy(cache)
    many.batch_repeat_interleave(count)
    return many


def last(
    model: Any, cache: Any, step: Int[Tensor, "rows 1"], *parts: Part
) -> Float[Tensor, "rows 1 vocabulary"]:
    """The logits of one more token, the cache left as it was."""
    with torch.no_grad(), attach(model, *parts, compile=False):
        found: Tensor = model(
            input_ids=step, use_cache=True, **with_cache(model, copy.deepcopy(cache))
        ).logits
        return found


@dataclass(frozen=True)
class Overlap:
    """How much two sets of heads share.

    Attributes:
        shared: heads of both.
        share: of the smaller set.
        expected: heads that random sets of these sizes share on average.
        bound: that random sets exceed once in a hundred, the 99th percentile.
        chance: that random sets share as many.
    """

    shared: frozenset[Head]
    share: float
    expected: float
    bound: int
    chance: float


def overlap(first: Iterable[Head], second: Iterable[Head], total: int) -> Overlap:
    """Two circuits laid over each other, against random ones: hypergeometric.

    Args:
        first: heads.
        second: heads.
        total: heads of the model.

    Raises:
        ValueError: an empty set, or more heads than there are.
    """
    a, b = frozenset(first), frozenset(second)
    if not a or not b or len(a | b) > total:
        raise UserError(f"sets of {len(a)} and {len(b)} heads cannot be laid over each other in {total}")
    ways = [comb(len(a), k) * comb(total - len(a), len(b) - k) for k in range(min(len(a), len(b)) + 1)]
    below, every, bound = 0, sum(ways), 0
    while (below := below + ways[bound]) < 0.99 * every:
        bound += 1
    both = a & b
    return Overlap(
        both, len(both) / min(len(a), len(b)), len(a) * len(b) / total, bound,
        sum(ways[len(both) :]) / every,
    )  # fmt: skip


def forced(
    weights: Float[Tensor, "rows keys"], heads: Iterable[Head], layers: int
) -> ReplacePattern:
    """Heads that attend from the last token as told, whatever they would look at.

    Args:
        weights: of each key, for each row; they sum to one.
        heads: (layer, head) that are edited.
        layers: of the model.

    Raises:
        ValueError: weights below zero, or that do not sum to one.
    """
    if bool((weights < 0).any()) or not torch.allclose(weights.sum(-1), weights.new_ones(()), atol=1e-4):
        raise UserError("weights are not below zero and sum to one in each row")
    pattern = weights[None, :, None, None].expand(layers, -1, -1, -1, -1)
    return ReplacePattern(pattern, heads=by_layer(heads), positions=LAST)
