"""Adapters of preplan and anchor signals to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from attlas.attach import attach
from attlas.attach.call import Call, ForwardPass
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.record.preplan_anchor import PreplanAnchor, credit, middle_layers
from reference.model import smollm2_of


@adapter("waad-fai", mechanism="preplan-anchor")
def two_maps(case: Case) -> Iterator[Check]:
    """The published maps as two heads of one layer."""
    config = case.config
    local, far = (case.inputs[f"attention_{name}"] for name in ("local", "global"))
    case.sizes(local, "T T")
    case.without_effect("config.seed")
    recorder = PreplanAnchor(
        window=config["W"], nearest=config["H_lo"], farthest=config["H_hi"], layers=[0]
    )
    tokens = len(local)
    step = ForwardPass(length=tokens)
    empty = torch.zeros(1, 2, tokens, 1)
    recorder.begin(step)
    call = Call(0, nn.Identity(), empty, empty, empty, 1.0, None, step, is_causal=True)
    at = torch.arange(tokens)
    recorder.update(call, torch.stack([local, far])[None], at, at)
    found = recorder.rhythm(config["response_start"], heads=([(0, 0)], [(0, 1)]))
    yield case.compare("out.waad", found.waad[0])
    yield case.compare("out.fai", found.fai[0])
    gamma = credit(
        found.waad[0], found.fai[0], top=config["q"], gain=config["gamma_amp"], back=config["alpha"],
        reach=config["k"],
    )  # fmt: skip
    yield case.compare("out.gamma", gamma)


@adapter("waad-fai-smollm2", mechanism="preplan-anchor")
def whole_model(case: Case) -> Iterator[Check]:
    """The real model's heads, signals and credit."""
    model, config = smollm2_of(case), case.config
    case.without_effect("config.text")  # of the ids that are given
    layers = config["sampled_layers"]
    assert middle_layers(model.config.num_hidden_layers, len(layers)) == layers
    recorder = PreplanAnchor(
        window=config["W"], nearest=config["H_lo"], farthest=config["H_hi"],
        share=config["head_quantile"], sampled=len(layers),
    )  # fmt: skip
    with attach(model, record=[recorder]):
        model(case.inputs["ids"].long()[None], logits_to_keep=1)
    # The published helper divides the tokens by the number of heads first.
    distance = recorder.result()["distance"][:, 0].mean(dim=-1) * model.config.num_attention_heads
    yield case.compare("out.mean_distance", distance)
    local, far = recorder.local_and_global()
    yield case.compare("out.local_heads", torch.tensor(local))
    yield case.compare("out.global_heads", torch.tensor(far))
    found = recorder.rhythm(config["response_start"])
    yield case.compare("out.waad", found.waad[0])
    yield case.compare("out.fai", found.fai[0])
    yield case.compare("out.gamma", credit(found.waad[0], found.fai[0]))
