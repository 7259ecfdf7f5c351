"""Adapters of secondary sinks to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from attlas.attach import attach
from attlas.attach.call import ForwardPass, Site
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.record.secondary_sinks import SecondarySinks
from reference.model import smollm2_of


@adapter("secondary-sinks", mechanism="secondary-sinks")
def sink_map(case: Case) -> Iterator[Check]:
    """Published states behind each layer, through the recorder's stream."""
    hidden = case.inputs["hidden"]
    case.sizes(hidden, "layers T dim")
    case.without_effect("config.seed")
    recorder = SecondarySinks(primary=int(case.config["primary"]))
    forward_pass = ForwardPass(length=hidden.shape[1])
    recorder.begin(forward_pass)
    last = len(hidden) - 1
    for layer, state in enumerate(hidden):
        at = (layer, "final") if layer == last else (layer + 1, "residual")
        recorder.stream(Site(*at, nn.Identity(), forward_pass), state[None])
    yield case.compare("out.sink_map", recorder.sink_map()[:, 0].to(torch.uint8))


@adapter("attention-sink-smollm2", mechanism="secondary-sinks")
def whole_model(case: Case) -> Iterator[Check]:
    """The real model's sink metric, and what the first token receives."""
    model = smollm2_of(case)
    case.without_effect("config.texts")  # of the ids that are given
    ids, epsilon = case.inputs["ids"].long(), float(case.config["epsilon"])
    case.states(tokens=ids.shape[1])
    recorder = SecondarySinks()
    with attach(model, record=[recorder]):
        model(ids, logits_to_keep=1)
    yield case.compare("out.metric", recorder.sink_metric(epsilon))
    first = recorder.received()[..., 0]
    yield case.compare("out.importance_first", first.mean(dim=1))
    yield case.compare("out.sink_rate_first", (first > epsilon).float().mean(dim=1))
