"""Adapters of retrieval heads and their masking to published numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attlas.analyses.retrieval_heads import (
    MostAttended,
    copy_scores,
    find_needle,
    masked,
    most_attended,
)
from attlas.contract.cases import Case, Check, adapter
from attlas.inspect.runs import by_layer, greedy, logits_with
from reference.model import smollm2_of

#: Ends of a turn and of a line there.
STOP = (2, 144)


@adapter("retrieval-heads", mechanism="retrieval-heads")
def one_needle(case: Case) -> Iterator[Check]:
    """Scores of given attention and tokens; keys are padded with zeros on the right."""
    case.without_effect("config.seed")
    weights, generated = case.inputs["attention"], case.inputs["generated"].long()
    ids = case.inputs["prompt_ids"].long()
    case.sizes(weights, "steps layers heads _")
    case.states(prompt_len=len(ids))
    rows = weights.permute(1, 2, 0, 3)
    attended = most_attended(rows, torch.arange(rows.shape[-1]), case.config["topk"])
    first, end = case.config["needle"]
    yield case.compare("out.score", copy_scores(attended, generated, ids, (first, end)))


@adapter("retrieval-heads-smollm2", mechanism="retrieval-heads")
def whole_model(case: Case) -> Iterator[Check]:
    """Greedy decoding of the real model behind a needle."""
    model, ids = smollm2_of(case), case.inputs["ids"].long()
    case.without_effect("config.prompt_text", "config.generated_text")  # of ids that are given
    span = find_needle(ids.tolist(), tokenizer()(case.config["needle_text"])["input_ids"])
    told = case.config["needle_span"]
    yield Check("needle_span", float(max(abs(a - b) for a, b in zip(span, told, strict=True))), 0.0)
    recorder = MostAttended()
    said = greedy(model, ids, case.config["decode_steps"], record=[recorder], stop=STOP)
    generated = case.outs["generated"].long()
    yield Check("out.generated: tokens that differ", differ(said, generated), 0.0)
    yield case.compare(
        "out.score", copy_scores(recorder.result()[:, 0], torch.tensor(said), ids, span)
    )


@adapter("retrieval-head-masking-smollm2", mechanism="retrieval-heads")
def masking(case: Case) -> Iterator[Check]:
    """Logits and greedy answers with the queries of some heads at zero."""
    model, ids = smollm2_of(case), case.inputs["ids"].long()
    subset, steps = case.inputs["token_subset"].long(), case.config["decode_steps"]
    yield case.compare("out.logits_plain", logits_with(model, ids[None])[0, -1, subset])
    for which in ("retrieval", "other"):
        heads = case.inputs[f"{which}_heads"].tolist()
        case.states(**{f"{which}_heads": heads})
        parts = masked(model, by_layer(map(tuple, heads)))
        logits = logits_with(model, ids[None], *parts)[0, -1, subset]
        yield case.compare(f"out.logits_masked_{which}", logits)
        theirs = case.outs[f"generated_masked_{which}"].long()
        said = greedy(model, ids, steps, parts, stop=STOP)
        yield Check(f"out.generated_masked_{which}: differ", differ(said, theirs), 0.0)


def differ(ours: list[int], theirs: Tensor) -> float:
    """Tokens that are others; theirs are filled up with -1."""
    filled = ours + [-1] * (len(theirs) - len(ours))
    return float((torch.tensor(filled) != theirs).sum())


@cache
def tokenizer() -> Any:
    from attlas.models.load import load_tokenizer

    return load_tokenizer("smollm2")
