"""Checks of networks: what comes out, what is refused, and what is told."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch

from attlas.contract.measure import (
    Measure,
    Subject,
    check,
    distance,
    finite,
    holds,
    refuses,
    rows,
    same,
)  # fmt: skip


@check("network")
def precisions(subject: Subject) -> Iterator[Measure]:
    """The precision that goes in comes out."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = subject.layer(dtype=dtype)
        y = layer(*subject.inputs(layer, dtype=dtype))
        yield holds(str(dtype), y.dtype == dtype, f"gives {y.dtype}")
        yield finite(str(dtype), y)


@check("network")
def batches(subject: Subject) -> Iterator[Measure]:
    """The order of a batch, and splitting it, change nothing."""
    for case, options in subject.forms():
        layer = subject.layer(**options)
        given = subject.inputs(layer, batch=4, tokens=11)
        y = layer(*given)
        order = torch.tensor([2, 0, 3, 1])
        yield same(f"{case} order", layer(*rows(given, order)), y[order])
        none = layer(*rows(given, order[:0]))
        yield holds(f"{case} none", none.shape == y[:0].shape, f"gives {list(none.shape)}")
        alone = [layer(*rows(given, torch.tensor([row]))) for row in range(4)]
        yield same(f"{case} split", torch.cat(alone), y)


@check("network")
def deterministic(subject: Subject) -> Iterator[Measure]:
    """Twice the same input gives twice the same output, to the bit."""
    layer = subject.layer(dtype=torch.float32)
    given = subject.inputs(layer, tokens=33, dtype=torch.float32)
    yield Measure("twice", distance(layer(*given), layer(*given)), 0.0)


@check("network", when=lambda subject: torch.cuda.is_available(), poisoned=False)
def devices(subject: Subject) -> Iterator[Measure]:
    """On an accelerator it gives what it gives here, forward and backward."""
    for case, options in subject.forms():
        layer = subject.layer(**options)
        x, *more = subject.inputs(layer, tokens=33)
        there = subject.layer(**options).to("cuda")
        inputs = x.cuda().requires_grad_()
        y = there(inputs, *([t.cuda() for t in maps] for maps in more))
        yield same(case, y.cpu(), layer(x, *more))
        y.sum().backward()
        yield finite(f"{case} gradient", inputs.grad)


@check("network", when=lambda subject: subject.registered)
def unknown_options(subject: Subject) -> Iterator[Measure]:
    """An option that it does not take is a ValueError that names it."""
    from attlas.catalog.registry import make

    options = {**subject.kind.small, **subject.example, "no_such_option": 1}
    yield refuses("no_such_option=1", lambda: make(subject.name, **options), "no_such_option")


@check("network")
def described(subject: Subject) -> Iterator[Measure]:
    """The docstring of the module or the class tells the equations, the cost and the source."""
    docs = f"{inspect.getdoc(inspect.getmodule(subject.object))}\n{inspect.getdoc(subject.object)}"
    if not subject.registered:
        yield holds("docstring", bool(inspect.getdoc(subject.object)), "no docstring")
        return
    for word, of in (
        ("Cost:", "operations and memory, in a line"),
        ("Reduces to", "what it becomes in a special case, or to nothing"),
        ("Source", "the paper's title"),
    ):
        yield holds(word, word in docs, f"the docstring has no {word!r}: write it with {of}")
