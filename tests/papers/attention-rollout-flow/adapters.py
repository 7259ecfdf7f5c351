"""Adapters of rollout and flow to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.attach import attach
from attlas.contract.cases import Case, Check, adapter
from attlas.models.load import load
from attlas.parts.record.attention_rollout_flow import (
    AttentionRolloutFlow,
    flow,
    importance,
    rollout,
    with_residual,
)
from reference.model import smollm2

#: The layers whose numbers were saved, as the case tells in words.
FLOWS, SAVED = (0, 2, 5), (0, 9, 19, 29)


@adapter("attention-rollout-flow", mechanism="attention-rollout-flow")
def maps(case: Case) -> Iterator[Check]:
    """Rollouts, flows and relevances of given maps."""
    attention = case.inputs["attention"].double()
    case.sizes(attention, "layers heads tokens tokens")
    case.states(causal=bool((attention.triu(1) == 0).all()))
    case.without_effect("config.seed")
    raw = attention.mean(dim=1)
    halves = with_residual(raw)
    rolled = rollout(halves)
    yield case.compare("out.rollout_residual", rolled)
    yield case.compare("out.rollout_no_residual", rollout(raw))
    tokens = range(raw.shape[-1])
    flows = torch.stack([flow(halves[: layer + 1], tokens) for layer in range(len(raw))])
    yield case.compare("out.flow", flows)
    for name, shares in (("raw", raw), ("rollout", rolled), ("flow", flows)):
        yield case.compare(f"out.relevance_{name}", importance(shares))


@adapter("attention-rollout-models", mechanism="attention-rollout-flow")
def models(case: Case) -> Iterator[Check]:
    """MiniLM's and SmolLM2's own maps."""
    named = " ".join(case.config["models"])
    if "MiniLM-L6" not in named or "SmolLM2-135M" not in named:
        raise ValueError(f"config 'models' is {named!r}; the adapter takes MiniLM-L6 and SmolLM2-135M")
    case.without_effect("config.text")  # of the ids that are given
    recorder = AttentionRolloutFlow()
    with attach(load("minilm"), record=[recorder]) as session:
        session.model(input_ids=case.inputs["minilm_ids"].long()[None])
    found = recorder.result()
    yield case.compare("out.minilm_rollout", found["rollout"][:, 0])
    yield case.compare("out.minilm_raw_relevance", importance(found["raw"][:, 0]))
    flows = torch.stack([recorder.flow(layer)[0] for layer in FLOWS])
    yield case.compare("out.minilm_flow_relevance", importance(flows))
    with attach(smollm2(), record=["attention-rollout-flow"]) as session:
        session.model(case.inputs["smollm2_ids"].long()[None])
    rolled = session["attention-rollout-flow"]["rollout"]
    yield case.compare("out.smollm2_rollout", rolled[list(SAVED), 0])
