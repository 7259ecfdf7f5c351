"""Checks of networks: half precision, by autocast and by weights that are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from attlas.contract.measure import Measure, Subject, check

#: What is projected, in half precision whatever stands between.
PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d)
#: Roundings of a layer's own beside those of its projections: of products, weights and sums.
ROUNDINGS = 6


class _Rounded(torch.autograd.Function):
    """A tensor, and its gradient, rounded to another precision and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x and its gradient to the precision of dtype and back."""
    y: Tensor = _Rounded.apply(x, dtype)  # type: ignore[no-untyped-call]
    return y


def rounding(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose projections round what goes in, their weights and what comes out, and nothing else."""
    made = deepcopy(layer)
    for module in made.modules():
        if isinstance(module, PROJECTIONS):
            module.to(dtype).to(torch.float64)
            module.register_forward_pre_hook(
                lambda _, args: tuple(rounded(x, dtype) if isinstance(x, Tensor) else x for x in args)
            )
            module.register_forward_hook(lambda _, args, out: rounded(out, dtype))
    return made


@check("network")
def half_precision(subject: Subject) -> Iterator[Measure]:
    """Under autocast and with half-precision weights, outputs and gradients are off by roundings alone:
    by no more than a few times what rounding at the projections does."""
    options = subject.causal_options
    for dtype in (torch.bfloat16, torch.float16):
        layer = subject.layer(dtype=torch.float32, **options)
        given = _to(subject.inputs(layer, tokens=17, dtype=torch.float32), dtype)
        ways: dict[str, tuple[nn.Module, AbstractContextManager[Any]]] = {
            "autocast": (layer, torch.autocast("cpu", dtype=dtype)),
            "weights": (deepcopy(layer).to(dtype), nullcontext()),
        }
        for way, (half, context) in ways.items():
            truth = deepcopy(half).to(torch.float64)
            wide = _to(_to(given, torch.float32), torch.float64)
            wanted, around = (_pass(t, wide, nullcontext()) for t in (truth, rounding(truth, dtype)))
            mine = _to(given, dtype if way == "weights" else torch.float32)
            found = _pass(half, mine, context)
            for what, got, off, want in zip(
                ("outputs", "gradients"), found, around, wanted, strict=True
            ):
                size = max(float(want.norm()), torch.finfo(dtype).tiny)
                least = max(float((off - want).norm()) / size, torch.finfo(dtype).eps)
                error = float((got - want).norm().nan_to_num(nan=torch.inf)) / size
                yield Measure(f"{dtype} {way} {what}", error, ROUNDINGS * least)


def _to(given: list[Any], dtype: torch.dtype) -> list[Any]:
    return [x.to(dtype) if isinstance(x, Tensor) else [t.to(dtype) for t in x] for x in given]


def _pass(
    layer: nn.Module, given: list[Any], context: AbstractContextManager[Any]
) -> tuple[Tensor, Tensor]:
    """(outputs, gradients of the inputs and all parameters), in float64."""
    x = given[0].clone().requires_grad_()
    layer.zero_grad()
    with context:
        y = layer(x, *given[1:])
    torch.manual_seed(1)
    (y.double() * torch.randn(y.shape, dtype=torch.float64)).sum().backward()
    grads = [x.grad, *(p.grad for p in layer.parameters())]
    return y.detach().double(), torch.cat([g.double().flatten() for g in grads if g is not None])
