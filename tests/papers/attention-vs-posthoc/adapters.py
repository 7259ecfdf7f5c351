"""Adapter of attention, gradient and LIME to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.contract.cases import Case, Check, adapter
from attlas.studies.attention_vs_posthoc import ClsReader, gradient, lime


@adapter("attention-vs-posthoc", mechanism="attention-vs-posthoc")
def posthoc(case: Case) -> Iterator[Check]:
    """A reader with published weights, and its three explanations of one logit."""
    config, held = case.config, case.params
    heads, words = config["heads"], config["vocabulary"]
    stack = {
        name: torch.stack([held[f"heads.{h}.{name}.weight"] for h in range(heads)])
        for name in ("query", "key", "value", "classifier")
    }
    case.sizes(stack["query"], "heads d_attn d_in")
    case.sizes(stack["classifier"], "heads classes d_out")
    case.sizes(case.inputs["ids"], "T")
    case.without_effect("config.seed", "config.text")  # the text of the ids that are given
    model = ClsReader(
        len(words), config["d_in"], config["d_attn"], config["d_out"], heads, config["classes"],
        case.inputs["positional"],
    )  # fmt: skip
    model.load_state_dict({
        "embedding.weight": held["embedding.weight"], "positions": case.inputs["positional"],
        "q": stack["query"], "k": stack["key"], "v": stack["value"], "w": stack["classifier"],
    })  # fmt: skip
    model.requires_grad_(False)
    ids, label = case.inputs["ids"], config["class_explained"]
    with torch.enable_grad():
        e = model.embed(ids).requires_grad_()
        logits = model(e)
        (true,) = torch.autograd.grad(logits[label], e)
    e = e.detach()
    yield case.compare("out.logits", logits)
    rows = torch.stack([model.read(e, asking=one).weights for one in e], dim=1)
    yield case.compare("out.attention", rows)
    yield case.compare("out.alpha_mean", rows[:, 0].mean(dim=0))
    yield case.compare("out.alpha_max", rows[:, 0].amax(dim=0))
    yield case.compare("out.gradient", true)
    yield case.compare("out.gradient_theory", gradient(model, e, label))
    yield case.compare("out.gradient_mean", true.mean(dim=-1))
    yield case.compare("out.gradient_l1", true.abs().sum(dim=-1))
    yield case.compare("out.gradient_l2", true.norm(dim=-1))
    yield case.compare("out.gradient_xInput", (true * e).sum(dim=-1))
    asked = [words.index(word) for word in config["lime_tokens"]]
    yield case.compare("out.lime_approx", lime(model, ids, case.inputs["unk_ids"], asked, label))
