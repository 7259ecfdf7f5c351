"""Adapter of layer-wise relevance propagation to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from attlas.contract.cases import Case, Check, adapter
from attlas.inspect.relevance import RelevanceRules, relevance

NET = (
    "Conv3x3 pad1 - ReLU - MaxPool2 - Conv3x3 pad1 - ReLU - MaxPool2 - flatten - Linear(8) - ReLU - "
    "Linear"
)


@adapter("lrp-salient-relevance", mechanism="salient-relevance")
def lrp(case: Case) -> Iterator[Check]:
    """A small net; linear layers follow the αβ-rule with α = 1, convolutions the ε-rule."""
    case.states(net=NET, start="logit of the class, other classes zero")
    case.sizes(case.inputs["image"], "_ _ image _")
    case.without_effect("config.seed")
    held = case.params
    with torch.enable_grad(), RelevanceRules("alpha-beta", "epsilon"):
        image = case.inputs["image"].requires_grad_()
        x = F.max_pool2d(F.relu(F.conv2d(image, held["conv1.weight"], held["conv1.bias"], padding=1)), 2)
        second = x
        x = F.relu(F.conv2d(x, held["conv2.weight"], held["conv2.bias"], padding=1))
        flat = F.max_pool2d(x, 2).flatten(1)
        x = F.relu(F.linear(flat, held["fc1.weight"], held["fc1.bias"]))
        logits = F.linear(x, held["fc2.weight"], held["fc2.bias"])
    yield case.compare("out.logits", logits)
    classes = torch.tensor([case.config["class"]])
    found = relevance(logits, classes, [image, second, flat])
    names = ("out.relevance_input", "mid.relevance_conv2_input", "mid.relevance_fc1_input")
    for name, one in zip(names, found, strict=True):
        if name.startswith("out.") or name.removeprefix("mid.") in case.mids:
            yield case.compare(name, one)
