"""The checks of modules for feature maps: sizes, layouts, precision, memory, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from attlas.contract.layers.numbers import LargestTensor
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


def sized(
    subject: Subject, made: Any, height: int, width: int, dtype: torch.dtype = torch.float64
) -> list[Any]:
    """What its forward pass takes, of the nearest height and width that it can take."""
    x, *more = subject.inputs(made, dtype=dtype)
    sides = made.side(height), made.side(width)
    return [torch.randn(*x.shape[:2], *sides, dtype=dtype), *more]


@check("module")
def shapes(subject: Subject) -> Iterator[Measure]:
    """[batch, channels, height, width] in, the same out: one position, odd sizes, strips, one row."""
    made = subject.layer(dtype=torch.float32)
    for height, width in ((1, 1), (1, 9), (7, 1), (7, 5), (8, 12)):
        given = sized(subject, made, height, width, torch.float32)
        for batch in (1, 2):
            some = rows(given, torch.arange(batch))
            y = made(*some)
            case = f"batch={batch} {list(some[0].shape[2:])}"
            yield holds(case, y.shape == some[0].shape, f"gives {list(y.shape)}")
            yield finite(case, y)


@check("module")
def layouts(subject: Subject) -> Iterator[Measure]:
    """Maps that are not contiguous give what contiguous ones give."""
    made = subject.layer()
    dense, *more = subject.inputs(made)
    views = {
        "channels last": dense.contiguous(memory_format=torch.channels_last),
        "transposed": dense.mT.contiguous().mT,
        "every other": dense.repeat_interleave(2, dim=3)[..., ::2],
    }
    for case, view in views.items():
        yield holds(case, not view.is_contiguous(), "this check's input is contiguous")
        yield same(case, made(view, *more), made(dense, *more))


class _Plain(TorchDispatchMode):
    """Every operation by itself, on at least float32, its result rounded to `dtype`; no narrower casts.

    What a careful reader of the equations gets in that precision: nothing fused, nothing narrowed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.wide = torch.promote_types(dtype, torch.float32)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_floating_point():
            return args[0].clone()
        if func.is_view or func._schema.is_mutable:  # which must keep their storage
            return func(*args, **kwargs)
        widened = tree_map(self._as(self.wide), (args, kwargs))
        return tree_map(self._as(self.dtype), func(*widened[0], **widened[1]))

    @staticmethod
    def _as(dtype: torch.dtype) -> Any:
        def turned(each: Any) -> Any:
            narrow = isinstance(each, Tensor) and each.dtype in (torch.float32, torch.bfloat16)
            return each.to(dtype) if narrow else each

        return turned


@check("module")
def twice_the_plain_error(subject: Subject) -> Iterator[Measure]:
    """Against float64, the error is at most twice that of the operations one by one, and an ulp."""
    for dtype in (torch.float32, torch.bfloat16):
        made = subject.layer(dtype=dtype)
        given = sized(subject, made, 16, 17, dtype)
        with torch.no_grad():
            ours = made(*given)
            with _Plain(dtype):
                plain = made(*given)
            made, given = made.double(), tree_map(torch.Tensor.double, given)
            with _Plain(torch.float64):
                truth = made(*given)
        ulp = torch.finfo(dtype).eps * float(truth.abs().max())
        yield Measure(str(dtype), distance(ours, truth), 2 * distance(plain, truth) + ulp)


@check("module")
def extreme_inputs(subject: Subject) -> Iterator[Measure]:
    """Huge, empty and constant maps, and one loud position: no NaN, no Inf, forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        made = subject.layer(dtype=dtype)
        x, *more = subject.inputs(made, dtype=dtype)
        loud = torch.zeros_like(x)
        loud[:, :, 0, -1] = 1e4
        for case, extreme in (
            ("1e4", 1e4 * x), ("empty", 0 * x), ("constant", torch.full_like(x, 3.0)), ("one", loud),
        ):  # fmt: skip
            read = extreme.clone().requires_grad_()
            made.zero_grad()
            y = made(read, *more)
            y.float().mean().backward()
            grads = [p.grad for p in made.parameters()]
            yield finite(f"{case} {dtype}", y, read.grad, *grads)


@check("module", poisoned=False)
def memory_law(subject: Subject) -> Iterator[Measure]:
    """Twice the positions make the largest tensor twice as large where memory is linear, 4 × at most."""
    law = subject.object.memory_law
    yield holds("declared", law in ("linear", "quadratic"), f"memory_law is {law!r}")
    made = subject.layer(dtype=torch.float32)
    short, counts, held = made.side(24), [], []
    for height, width in ((short, short), (short, made.side(2 * short))):
        given = sized(subject, made, height, width, torch.float32)
        with torch.no_grad(), LargestTensor() as seen:
            made(*given)
        counts.append(height * width)
        held.append(seen.elements)
    growth = counts[1] / counts[0]
    bound = 1.05 * growth if law == "linear" else 1.05 * growth**2
    yield Measure(law, held[1] / held[0], bound)


@check("module")
def wrong_sizes(subject: Subject) -> Iterator[Measure]:
    """Sizes that do not fit are a ValueError that names the argument."""
    yield refuses("channels=0", lambda: subject.layer(channels=0), "channels")
    made = subject.layer(dtype=torch.float32)
    x, *more = subject.inputs(made, dtype=torch.float32)
    yield refuses("another width", lambda: made(x[:, :-1], *more), "x must", "parameter 'x'")
    yield refuses("no batch", lambda: made(x[0], *more), "x must", "parameter 'x'")
    yield refuses("no height", lambda: made(x[:, :, :0], *more), "x must", "parameter 'x'")
    if made.multiple > 1:
        yield refuses("no multiple", lambda: made(x[..., :-1], *more), "multiples")


@check("module")
def earlier_maps(subject: Subject) -> Iterator[Measure]:
    """Earlier maps are read where the module takes them, and refused by name where it does not."""
    made = subject.layer()
    x, *more = subject.inputs(made)
    if not subject.object.takes_previous:
        yield refuses("earlier map", lambda: made(x, [x]), "previous")
        return
    yield holds("example", bool(made.previous), "the example names no earlier maps")
    yield refuses("left out", lambda: made(x), "previous")
    others = [2 * t for t in more[0]]
    yield holds(
        "read", not torch.equal(made(x, others), made(x, *more)), "earlier maps change nothing"
    )


@check("module")
def gated(subject: Subject) -> Iterator[Measure]:
    """Where it has a gate, the gate spreads over the map."""
    made = subject.layer()
    given = subject.inputs(made)
    try:
        gate = made.gate(*given)
    except NotImplementedError:
        yield holds("no gate", True, "")
        return
    spread = torch.broadcast_shapes(gate.shape, given[0].shape) == given[0].shape
    yield holds("shape", spread, f"{list(gate.shape)} does not spread over {list(given[0].shape)}")
    yield finite("gate", gate)


@check("module", when=lambda subject: subject.reduces_to is not None)
def reduces_to(subject: Subject) -> Iterator[Measure]:
    """In its declared special case it is the other module."""
    from attlas.catalog import registry

    reduction = subject.reduces_to
    assert reduction is not None
    made = subject.layer(noise=0.0, **reduction.options)
    other: Any = registry.find(reduction.to).object(made.channels)
    other = other.double().eval()
    with torch.no_grad():
        reduction.align(made, other)
    given = subject.inputs(made)
    yield same(reduction.to, made(*given), other(*given))
