"""Checks of networks: gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from attlas.catalog.kinds import LAYER
from attlas.contract.measure import Measure, Subject, check, distance, holds, rows, same


def _trains(subject: Subject) -> bool:
    """Whether it has parameters at all."""
    return next(subject.made().parameters(), None) is not None


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


@check("network", when=_trains)
def computed_again(subject: Subject) -> Iterator[Measure]:
    """Two passes under activation checkpointing train as without: same gradients, and what moves in
    training has moved alike."""
    layer = subject.layer(**subject.causal_options).train()
    passes = [subject.inputs(layer) for _ in range(2)]

    def trained(run: Callable[..., Tensor]) -> dict[str, Tensor]:
        mine = deepcopy(layer)
        torch.manual_seed(1)
        ys = [run(mine, x.clone().requires_grad_(), *more) for x, *more in passes]
        sum((y * (n + 1)).square().sum() for n, y in enumerate(ys)).backward()  # type: ignore[union-attr]
        grads = {n: p.grad for n, p in mine.named_parameters() if p.grad is not None}
        return {**grads, **dict(mine.named_buffers())}

    plain = trained(lambda mine, *given: mine(*given))
    for reentrant in (False, True):
        found = trained(partial(checkpoint, use_reentrant=reentrant))
        for name, wanted in plain.items():
            yield same(f"use_reentrant={reentrant} {name}", found[name].double(), wanted.double())


@check("network", when=_trains)
def copied_in_training(subject: Subject) -> Iterator[Measure]:
    """Between two steps it can be copied; having run in inference mode it can be trained."""
    layer = subject.layer(**subject.causal_options)
    given = subject.inputs(layer)
    with torch.inference_mode():
        layer(*given)
    y = layer.train()(*given)
    loss = y.square().sum()
    if (more := getattr(layer, "auxiliary_loss", None)) is not None:
        loss = loss + more
    loss.backward()
    twin = deepcopy(layer).eval()
    yield Measure("copied", distance(twin(*given), layer.eval()(*given)), 0.0)


@check("network", when=_trains)
def per_sample_gradients(subject: Subject) -> Iterator[Measure]:
    """`torch.func` gives each row's own gradients at once, as one by one."""
    layer = subject.layer(**subject.causal_options)
    weights = {n: p.detach() for n, p in layer.named_parameters()}
    given = subject.inputs(layer, tokens=5)

    def loss(weights: dict[str, Tensor], *row: Any) -> Tensor:
        batch = [x[None] if isinstance(x, Tensor) else [t[None] for t in x] for x in row]
        y: Tensor = functional_call(layer, weights, (*batch,))
        return y.square().sum()

    with warnings.catch_warnings(action="ignore"):  # of what vmap does row by row
        each = vmap(grad(loss), in_dims=(None, *(0 for _ in given)), randomness="same")(
            weights, *given
        )
    for row in range(2):
        y = layer(*rows(given, torch.tensor([row])))
        alone = torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True)
        for name, wanted in zip(weights, alone, strict=True):
            wanted = torch.zeros_like(weights[name]) if wanted is None else wanted
            yield same(f"row {row} {name}", each[name][row], wanted)


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
