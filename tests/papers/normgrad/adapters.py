"""Adapter of NormGrad to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from attlas.analyses.normgrad import combined, saliency
from attlas.contract.cases import Case, Check, adapter
from attlas.inspect.pictures import from_0_to_1, outputs_of, resized

NET = (
    "Conv3x3-ReLU-MaxPool2(layer 2)-Conv3x3-ReLU(layer 4)-AdaptiveAvgPool2-Flatten-Linear(4)"
)
#: Published names of both phases that are spelled otherwise here.
OURS = {"conv3x3_depthwise": "conv3x3-depthwise", "filter_norm": "positive-norm"}


@adapter("normgrad", mechanism="normgrad")
def normgrad(case: Case) -> Iterator[Check]:
    """Every combination of both phases at two layers of a small net, and both layers together."""
    case.states(net=NET)
    case.sizes(case.inputs["image"], "_ _ image _")
    case.without_effect("config.seed")
    held, size = case.params, case.inputs["image"].shape[-2:]
    first, second = (held[f"{i}.weight"].shape for i in (0, 3))
    classes, features = held["7.weight"].shape
    side = int((features // second[0]) ** 0.5)
    net = nn.Sequential(
        nn.Conv2d(first[1], first[0], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(second[1], second[0], 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(features, classes),
    )  # fmt: skip
    net.load_state_dict(dict(held))
    with torch.enable_grad(), outputs_of(net, ("2", "4")) as kept:
        logits = net(case.inputs["image"])
        states = [kept["2"], kept["4"]]
        found = torch.autograd.grad(logits[0, case.config["class"]], states)
    maps = []
    for name, x, g in zip(("layer2", "layer4"), states, found, strict=True):
        if f"{name}.act" in case.mids:
            yield case.compare(f"mid.{name}.act", x)
        if f"{name}.grad" in case.mids:
            yield case.compare(f"mid.{name}.grad", -g)  # of the loss there, minus the logit
        for key in [key for key in case.outs if key.startswith(f"{name}.")]:
            _, extract, aggregate = key.split(".")
            one = saliency(x.detach(), g, OURS.get(extract, extract), OURS.get(aggregate, aggregate))
            made = from_0_to_1(resized(one, size))
            yield case.compare(f"out.{key}", made[0])
            if (extract, aggregate) == ("conv1x1", "norm"):
                maps.append(made)
    # The published product of both is the square of their geometric mean.
    yield case.compare("out.combined.conv1x1.norm", combined(maps)[0].square())
