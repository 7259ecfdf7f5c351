"""Checks of networks: gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from attlas.catalog.kinds import LAYER
from attlas.contract.measure import Measure, Subject, check, holds


@check("network")
def gradients_reach(subject: Subject) -> Iterator[Measure]:
    """Every parameter gets a gradient that is neither missing, nor zero, nor infinite."""
    for case, options in subject.forms():
        layer = subject.layer(**options)
        y = layer(*subject.inputs(layer))
        (y * torch.randn_like(y)).sum().backward()
        for name, parameter in layer.named_parameters():
            grad = parameter.grad
            reached = grad is not None and bool(grad.isfinite().all()) and bool(grad.abs().sum() > 0)
            yield holds(f"{case} {name}", reached, f"{name} gets no finite gradient")


@check("network")
def finite_differences(subject: Subject) -> Iterator[Measure]:
    """Gradients in float64 agree with finite differences, along random directions."""
    narrow: dict[str, Any] = {"dim": 8} if subject.kind is LAYER else {}
    for case, options in subject.forms():
        layer = subject.layer(**narrow, **options)
        names, values = zip(*layer.named_parameters(), strict=True)

        x, *more = subject.inputs(layer, batch=1, tokens=3)

        def forward(x: Tensor, *weights: Tensor, layer=layer, names=names, more=more) -> Tensor:  # type: ignore[no-untyped-def]
            y: Tensor = functional_call(layer, dict(zip(names, weights, strict=True)), (x, *more))
            return y

        weights = [value.detach().clone().requires_grad_() for value in values]
        agree = torch.autograd.gradcheck(
            forward, (x.requires_grad_(), *weights), fast_mode=True, raise_exception=False
        )
        yield holds(case, bool(agree), "gradients do not agree with finite differences")
