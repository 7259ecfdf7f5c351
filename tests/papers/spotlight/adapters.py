"""Adapters of Spotlight to published numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attlas.attach import attach
from attlas.attach.blocks import weight_blocks
from attlas.attach.call import Call, ForwardPass
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.steer.spotlight import Spotlight
from reference.model import smollm2_of


@adapter("spotlight", mechanism="spotlight")
def one_layer(case: Case) -> Iterator[Check]:
    """Weights of a layer, steered: queries and keys are made whose softmax they are."""
    config, weights, v = case.config, case.inputs["attention"], case.inputs["v"]
    batch, heads, tokens, _ = weights.shape
    assert (batch, heads, tokens) == (config["B"], config["heads"], config["T"])
    assert v.shape == (batch, config["kv_heads"], tokens, config["head_dim"])
    k = torch.eye(tokens).expand(batch, config["kv_heads"], -1, -1)
    q = weights.clamp(min=1e-30).log()
    call = Call(0, nn.Identity(), q, k, v, 1.0, None, ForwardPass(length=tokens), is_causal=True)
    spans = [[tuple(span) for span in row] for row in config["span_ranges"]]
    part = Spotlight(spans, config["target_proportion"], over="layer")
    call.score_mod = part.score_mod(call)
    steered = torch.cat([block for block, _, _ in weight_blocks(call)], dim=2)
    if "attention" in case.mids:
        yield case.compare("mid.attention", steered)
    summed = steered @ v.repeat_interleave(heads // v.shape[1], dim=1)
    joined = summed.transpose(1, 2).flatten(2)
    yield case.compare("out.output", joined @ case.params["o_proj.weight"].T)


class Watched(Spotlight):
    """Tells each layer's share before it is steered."""

    def shares(self, call: Call, inside: Tensor, heads: Tensor) -> Tensor:
        found = super().shares(call, inside, heads)
        self.told[call.layer] = found[0, 0, 0]
        return found


@adapter("spotlight-smollm2", mechanism="spotlight")
def whole_model(case: Case) -> Iterator[Check]:
    """The real model's logits behind a marked instruction."""
    model, config = smollm2_of(case), case.config
    case.without_effect("config.prompt_text", "config.span_text")  # of the ids that are given
    ids, subset = case.inputs["ids"].long()[None], case.inputs["token_subset"].long()
    part = Watched([tuple(config["span"])], config["target_proportion"], over="layer")
    part.told: dict[int, Any] = {}
    yield case.compare("out.logits_plain", model(ids).logits[0, -1, subset])
    with attach(model, part):
        steered = model(ids).logits[0, -1, subset]
    yield case.compare("out.logits_steered", steered)
    told = torch.stack([part.told[layer] for layer in sorted(part.told)])
    yield case.compare("out.proportion_before", told)
