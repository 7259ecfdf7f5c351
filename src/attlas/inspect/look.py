"""Looking: recorders watch one run together, analyses make their own, and all is kept as it comes.

    looked = look(attlas.load("smollm2"), tokenizer=..., text="To be, or not to be")
    looked                                    in a notebook: the page
    looked.scores["induction"].top(5)         [(layer, head), ...]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from attlas.attach import attach
from attlas.attach.part import Part, Recorder
from attlas.calibration.run import windows
from attlas.errors import UserError
from attlas.inspect.find import Named, chosen
from attlas.inspect.store import Store
from attlas.inspect.subject import Subject
from attlas.kinds.analysis import Analysis, Findings, Scores, evaluating
from attlas.parts.record.multiscale_attention_view import MultiscaleAttentionView, Neuron
from attlas.parts.record.patterns import PatternRecorder
from attlas.parts.record.pyramid import Pyramid

#: Heads whose patterns are drawn unless more are asked for.
DRAWN = 4

Tick = Callable[[str, float], None]


def unheard(what: str, share: float) -> None:
    """A tick that tells nobody."""


@dataclass
class Looked:
    """All that was found in a model.

    Attributes:
        subject: what was looked at.
        name: of the model.
        findings: by the names of recorders and analyses.
        patterns: of some heads over the text, {(layer, head): pyramid}.
        against: the name and the scores of what it is compared with.
    """

    subject: Subject
    name: str
    findings: Mapping[str, Findings]
    patterns: Mapping[tuple[int, int], Pyramid] = field(default_factory=dict)
    neurons: Mapping[tuple[int, int], Neuron] = field(default_factory=dict)
    against: tuple[str, Mapping[str, Scores]] | None = None

    @property
    def scores(self) -> dict[str, Scores]:
        """Scores of heads, by name; one that two analyses give has the analysis's name before it."""
        found: dict[str, Scores] = {}
        for label, each in self.findings.items():
            for name, scores in each.heads.items():
                found[name if name not in found else f"{label}: {name}"] = scores
        return found

    def lines(self) -> list[dict[str, Any]]:
        """One line for each head, with all scores."""
        layers, heads = self.subject.layers, self.subject.heads
        scores = {name: each.values.tolist() for name, each in self.scores.items()}
        return [
            {"layer": layer, "head": head, **{n: _number(v[layer][head]) for n, v in scores.items()}}
            for layer in range(layers) for head in range(heads)
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        """The page, in a frame."""
        from attlas.inspect.page import atlas

        return atlas(self)._repr_html_()


def _number(value: float) -> float | None:
    return None if value != value else value


def look(
    model: nn.Module,
    *,
    text: str | None = None,
    tokenizer: Any = None,
    subject: Subject | None = None,
    preset: str = "roles",
    names: Sequence[str] = (),
    name: str = "",
    drawn: int = DRAWN,
) -> Looked:
    """Look into a model.

    Args:
        model: a Transformers model whose attention `attlas.attach` can watch, or one of attlas's own.
        text: that it reads.
        tokenizer: of the model.
        subject: in place of text, what is given to the model.
        preset: roles, flow, circuits, weights, sinks.
        names: recorders and analyses to look with in place of the preset's.
        name: of the model, for titles.
        drawn: how many heads' patterns are kept.

    Raises:
        ValueError: a text without a tokenizer, or something that cannot be looked at.
    """
    if subject is None:
        ids = None if text is None else text_ids(text, tokenizer)
        subject = Subject(model, tokenizer=tokenizer, input_ids=ids)
    found = findings(subject, chosen(preset, names))
    looked = Looked(subject, name or type(model).__name__, found)
    looked.patterns, looked.neurons = patterns(subject, interesting(looked.scores, drawn))
    return looked


def text_ids(
    text: str | None, tokenizer: Any, tokens: int | None = None, seed: int = 0
) -> Int[Tensor, "1 tokens"]:
    """A text as token ids, cut to `tokens`; a passage of Shakespeare, drawn by the seed, unless given.

    Raises:
        ValueError: a text of no token, or no tokenizer.
    """
    if tokenizer is None:
        raise UserError("text needs the model's tokenizer: give tokenizer=")
    if text is None:
        return windows(tokenizer, tokens=tokens or 512, length=tokens or 512, seed=seed)[0]
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise UserError("the text is empty; give one of at least one token")
    return torch.tensor([ids[:tokens]])


def findings(
    subject: Subject, lookers: Sequence[Named], store: Store | None = None, tick: Tick = unheard,
    parts: Sequence[Part] = (),
) -> dict[str, Findings]:  # fmt: skip
    """What each looker finds, in their order.

    Args:
        subject: what is looked at.
        lookers: recorders, which watch one run together, and analyses.
        store: keeps each finding, and has those of a run that was stopped.
        tick: told what is under way, and the share of it that is done.
        parts: attached while recorders watch.

    Raises:
        ValueError: a looker that cannot work on this subject.
    """
    before = {n.label: store.load(n.label) if store else None for n in lookers}
    found = {label: one for label, one in before.items() if one is not None}
    todo = [named for named in lookers if named.label not in found]
    recorders = {n.label: n.looker for n in todo if isinstance(n.looker, Recorder)}
    if recorders:
        tick("watching one run", 0.0)
        for label, one in _watched(subject, recorders, parts).items():
            found[label] = one
            if store:
                store.save(label, one)
    for named in todo:
        looker = named.looker
        if not isinstance(looker, Analysis):
            continue
        tick(named.label, 0.0)
        one = looker.look(subject, partial(tick, named.label))
        found[named.label] = one
        if store:
            store.save(named.label, one)
    return {n.label: found[n.label] for n in lookers}


def _watched(
    subject: Subject, recorders: Mapping[str, Recorder], parts: Sequence[Part]
) -> dict[str, Findings]:
    if subject.pixel_values is None:
        subject.require("text", " and ".join(recorders))
    given = list(recorders.values())
    with evaluating(subject.model), attach(subject.model, *parts, record=given, compile=False):
        subject.forward()
    return {label: Findings(heads=one.head_scores()) for label, one in recorders.items()}


def interesting(scores: Mapping[str, Scores], count: int) -> list[tuple[int, int]]:
    """Heads to draw: the first of each score in turn, then the second, none twice."""
    found: dict[tuple[int, int], None] = {}
    ranked = [each.top(count) for each in scores.values()]
    for place in range(count):
        for heads in ranked:
            if place < len(heads) and len(found) < count:
                found[heads[place]] = None
    return list(found)


def patterns(
    subject: Subject, heads: Sequence[tuple[int, int]], parts: Sequence[Part] = ()
) -> tuple[dict[tuple[int, int], Pyramid], dict[tuple[int, int], Neuron]]:
    """The patterns of some heads over the first text at all scales, and neurons of its first tokens."""
    if subject.input_ids is None or not heads:
        return {}, {}
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    recorder, near = PatternRecorder(heads=by_layer), MultiscaleAttentionView(heads=by_layer)
    first = subject.rows(slice(0, 1))
    with evaluating(subject.model), attach(subject.model, *parts, record=[recorder, near], compile=False):
        first.forward()
    return recorder.patterns(), near.neurons()
