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
    """Gradients in float64 agree with finite differences, along a random direction of all at once."""
    narrow: dict[str, Any] = {"dim": 8} if subject.kind is LAYER else {}
    for case, options in subject.forms():
        layer = subject.layer(**narrow, **options)
        names, weights = zip(*layer.named_parameters(), strict=True)
        x, *more = subject.inputs(layer, batch=1, tokens=3)
        values = [x, *(w.detach().clone() for w in weights)]
        ways = [torch.randn_like(value) for value in values]
        ways = [way / way.norm() for way in ways]

        # One number moves input and weights together, each by a way of length 1, so that two passes
        # are enough for all of them, and what is wrong with one of them counts as if it were alone.
        def moved(  # type: ignore[no-untyped-def]
            t: Tensor, layer=layer, names=names, values=values, ways=ways, more=more
        ) -> Tensor:
            x, *there = (value + t * way for value, way in zip(values, ways, strict=True))
            y: Tensor = functional_call(layer, dict(zip(names, there, strict=True)), (x, *more))
            return y

        start = torch.zeros((), dtype=torch.float64, requires_grad=True)
        agree = torch.autograd.gradcheck(
            moved, (start,), fast_mode=True, raise_exception=False, atol=1e-6, rtol=1e-4
        )
        yield holds(case, bool(agree), "gradients do not agree with finite differences")
