"""Adapters of massive values and their disruption to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from attlas.attach import attach
from attlas.attach.call import Call, ForwardPass
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.record.massive_values import MassiveValues, MassiveValuesDisruption
from reference.model import smollm2_of

WHICH = {"hi": "largest", "lo": "smallest"}


@adapter("massive-values", mechanism="massive-values")
def one_layer(case: Case) -> Iterator[Check]:
    """Norms of one layer's queries and keys, and both disrupted; tokens come before heads there."""
    config = case.config
    q, k = (case.inputs[name].transpose(1, 2) for name in "qk")
    assert q.shape[1:] == (config["heads"], config["T"], config["head_dim"])
    assert k.shape[1] == config["kv_heads"]
    step = ForwardPass(length=q.shape[2])
    call = Call(0, nn.Identity(), q, k, torch.zeros_like(k), 1.0, None, step, is_causal=True)
    recorder = MassiveValues()
    recorder.observe(call)
    found = recorder.result()
    for name in "qk":
        yield case.compare(f"out.{name}_norm", found[name][0, 0])
    for tail, which in WHICH.items():
        disrupted = MassiveValuesDisruption(which=which).position(call, q, k)
        for name, x in zip("qk", disrupted, strict=True):
            yield case.compare(f"out.{name}_{tail}", x.transpose(1, 2))


@adapter("massive-values-smollm2", mechanism="massive-values")
def whole_model(case: Case) -> Iterator[Check]:
    """The real model's norms in all layers, and its logits when all layers are disrupted."""
    model = smollm2_of(case)
    case.without_effect("config.text")  # of the ids that are given
    ids, subset = case.inputs["ids"].long()[None], case.inputs["token_subset"].long()
    with attach(model, record=["massive-values"]) as session:
        yield case.compare("out.logits_plain", model(ids).logits[0, -1, subset])
    norms = session["massive-values"]
    for name in "qkv":
        yield case.compare(f"out.{name}_norm", norms[name][:, 0])
    for tail, which in WHICH.items():
        with attach(model, MassiveValuesDisruption(which=which)):
            logits = model(ids).logits[0, -1, subset]
        yield case.compare(f"out.logits_{tail}", logits)
