"""Checks of networks: saved, copied, moved, compiled; and nothing left behind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.modules import module as torch_module

from attlas.contract.measure import Measure, Subject, check, distance, holds, same
from attlas.contract.unchecked import unchecked


@check("network")
def saved(subject: Subject) -> Iterator[Measure]:
    """Through safetensors into a new layer, the outputs stay the same to the bit."""
    for case, options in subject.forms():
        layer = subject.layer(dtype=torch.float32, **options)
        stored = load(save({k: v.contiguous() for k, v in layer.state_dict().items()}))
        fresh = subject.layer(dtype=torch.float32, noise=0.3, **options)
        fresh.load_state_dict(stored)
        given = subject.inputs(layer, dtype=torch.float32)
        yield Measure(case, distance(fresh(*given), layer(*given)), 0.0)


@check("network")
def copied(subject: Subject) -> Iterator[Measure]:
    """A deep copy gives the same outputs, and shares no parameter."""
    layer = subject.layer(dtype=torch.float32)
    twin = deepcopy(layer)
    given = subject.inputs(layer, dtype=torch.float32)
    before = layer(*given)
    yield Measure("deepcopy", distance(twin(*given), before), 0.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    yield Measure("apart", distance(layer(*given), before), 0.0)


@check("network")
def materialised(subject: Subject) -> Iterator[Measure]:
    """Made on the meta device it gives the same outputs to the bit, emptied onto a real one or assigned
    to; constants are not rounded with the weights."""
    for case, options in subject.forms():
        real = subject.layer(dtype=torch.float32, **options)
        given = subject.inputs(real, dtype=torch.float32)
        before, state = real(*given), deepcopy(real.state_dict())
        with torch.device("meta"):
            blank, other = (subject.made(**options).eval() for _ in range(2))
        blank.to_empty(device="cpu").load_state_dict(state)
        other.load_state_dict(state, assign=True)
        real.to(torch.bfloat16).to(torch.float32).load_state_dict(state)
        for way, layer in {"to_empty": blank, "assigned": other, "rounded": real}.items():
            yield Measure(f"{case} {way}", distance(layer(*given), before), 0.0)


@check("network")
def moved(subject: Subject) -> Iterator[Measure]:
    """To float32 and back to float64, the outputs are those of weights rounded to float32."""
    for case, options in subject.forms():
        layer = subject.layer(**options)
        given = subject.inputs(layer)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(parameter.float())
        before = layer(*given)
        yield same(case, layer.to(torch.float32).to(torch.float64)(*given), before)


@contextmanager
def tracing() -> Iterator[None]:
    """Inside, graphs are made of functions as they stand in their files, and quietly."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a break in the graph costs speed, not truth
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"), unchecked():
            yield
    finally:
        logger.setLevel(level)
        torch.compiler.reset()


@check("network", poisoned=False)
def compiled(subject: Subject) -> Iterator[Measure]:
    """`torch.compile` gives what the plain layer gives, in one graph unless the mechanism tells why not;
    with padding too."""
    layer, supports = subject.layer(**subject.causal_options), subject.supports
    given, whole = subject.inputs(layer), not (supports and supports.graph_breaks)
    with tracing():
        fast: Any = torch.compile(layer, backend="aot_eager", fullgraph=whole)
        yield same("aot_eager", fast(*given), layer(*given))
        if supports and supports.masks != "none":
            valid = padded(9)
            fast = torch.compile(layer, backend="eager", fullgraph=whole)
            # What stands at padding is nobody's: windows count it where no truth may be asked.
            yield same("padding", fast(*given, mask=valid)[valid], layer(*given, mask=valid)[valid])


def exports(subject: Subject) -> bool:
    """Whether the subject takes sequences of any length, exported too."""
    return subject.supports is not None and not subject.supports.one_length


@check("network", when=exports, poisoned=False)
def exported(subject: Subject) -> Iterator[Measure]:
    """`torch.export` makes one program for any length, with padding where the layer takes it."""
    layer, supports = subject.layer(**subject.causal_options), subject.supports
    takes = supports is not None and supports.masks != "none"
    any_length = {1: torch.export.Dim.DYNAMIC}
    shapes: dict[str, Any] = {"x": any_length, **({"mask": any_length} if takes else {})}

    def call(tokens: int) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        (x,) = subject.inputs(layer, tokens=tokens)
        return (x,), {"mask": padded(tokens)} if takes else {}

    with tracing():
        args, more = call(9)
        program = torch.export.export(layer, args, more, dynamic_shapes=shapes).module()
        for tokens in (5, 33):
            args, more = call(tokens)
            rows = more.get("mask", slice(None))
            yield same(f"{tokens} tokens", program(*args, **more)[rows], layer(*args, **more)[rows])


def padded(tokens: int) -> Tensor:
    """Two sequences, the first of which begins three tokens later: True at tokens."""
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[0, :3] = False
    return valid


def surroundings() -> dict[str, Any]:
    """What a mechanism could leave changed behind it."""
    from attlas.hf.interface import registered

    hooks = [
        name for name in vars(torch_module)
        if name.startswith("_global_") and isinstance(getattr(torch_module, name), dict)
    ]  # fmt: skip
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
        "generator": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "global hooks": {name: len(getattr(torch_module, name)) for name in hooks},
        "functional": {n: id(f) for n, f in vars(torch.nn.functional).items() if callable(f)},
        "torch": {n: id(f) for n, f in vars(torch).items() if callable(f)},
        **registered(),
    }


@check("network", poisoned=False)
def no_trace(subject: Subject) -> Iterator[Measure]:
    """Used forward, backward and step by step, it leaves no hook, function or state changed."""
    layer = subject.layer(**subject.causal_options)
    given = subject.inputs(layer)
    before = surroundings()
    layer(*given).sum().backward()
    if subject.causal_form:
        cache = layer.init_cache()
        layer(*given, cache=cache)
    after = surroundings()
    for what, value in before.items():
        yield holds(what, after[what] == value, f"{what} changed")
