"""Checks of layers: precision against float64, extreme inputs, memory, determinism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attlas import queries
from attlas.attention import Attention
from attlas.contract.measure import Measure, Subject, check, distance, finite, holds, same
from attlas.contract.networks.state import padded


def staged(layer: Any, x: Tensor) -> Tensor:
    """The layer by its stages, one after the other, nothing fused."""
    q, k, v, inputs = layer.prepare(x)
    y: Tensor = layer.output(layer.aggregate(layer.weigh(q, k, inputs), v, inputs), inputs)
    return y


@check("layer")
def fused_is_staged(subject: Subject) -> Iterator[Measure]:
    """`attend` in one call gives what the stages give one by one."""
    for case, options in subject.forms():
        layer = subject.layer(**options)
        for length in (1, 33):
            x = torch.randn(2, length, layer.dim, dtype=torch.float64)
            yield same(f"{case} tokens={length}", layer(x), staged(layer, x))


@check("layer")
def twice_the_plain_error(subject: Subject) -> Iterator[Measure]:
    """Against float64, the error is at most twice that of the plain computation, and an ulp."""
    for case, options in subject.forms():
        for dtype in (torch.float32, torch.bfloat16):
            layer = subject.layer(dtype=dtype, **options)
            x = torch.randn(2, 65, layer.dim, dtype=dtype)
            fast, plain = layer(x), staged(layer, x)
            truth = staged(layer.double(), x.double())
            ulp = torch.finfo(dtype).eps * float(truth.detach().abs().max())
            bound = 2 * distance(plain, truth) + ulp
            yield Measure(f"{case} {dtype}", distance(fast, truth), bound)


@check("layer")
def extreme_inputs(subject: Subject) -> Iterator[Measure]:
    """Logits of ±1e4 and rows that see nothing: no NaN, no Inf, forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = subject.layer(dtype=dtype)
        x = torch.randn(2, 9, layer.dim, dtype=dtype)
        with torch.no_grad():
            q, k, *_ = layer.prepare(x)
            largest = float((layer.scale * q.abs().amax() * k.abs().amax() * q.shape[-1]).abs())
        loud = (x * min(1e3, (1e4 / largest) ** 0.5)).requires_grad_()
        y = layer(loud)
        y.float().square().mean().backward()
        yield finite(f"logits of 1e4 {dtype}", y, loud.grad)
        yield finite(f"logits of 1e4 {dtype} parameters", *(p.grad for p in layer.parameters()))
        blind = torch.ones(2, 1, 9, 9, dtype=torch.bool)
        blind[0, 0, 3] = False
        blind[1] = False
        unseen = {"all padding": blind[:, 0, 0] & False, "rows that see nothing": blind}
        taken = {"none": 0, "padding": 1, "pairs": 2}[subject.object.supports.masks]
        for what, mask in list(unseen.items())[:taken]:
            quiet = x.clone().requires_grad_()
            y = layer(quiet, mask=mask)
            y.float().sum().backward()
            yield finite(f"{what} {dtype}", y, quiet.grad)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = [t.untyped_storage().nbytes() // t.element_size()
                for t in tree_leaves(out) if isinstance(t, Tensor)]  # fmt: skip
        self.elements = max([self.elements, *held])
        return out


@contextmanager
def pairs_at_once(count: int) -> Iterator[None]:
    """Inside, layers hold so many pairs at once where they attend in blocks, differentiated or not."""
    before = queries.BLOCK, queries.CPU_BLOCK, queries.KEPT
    queries.BLOCK, queries.CPU_BLOCK, queries.KEPT = count, count, 0
    try:
        yield
    finally:
        queries.BLOCK, queries.CPU_BLOCK, queries.KEPT = before


def blocked(subject: Subject) -> bool:
    """Whether the subject attends in blocks of queries where there are many."""
    own = any(getattr(subject.object, s) is not getattr(Attention, s) for s in Attention.MIDDLE)
    rows = subject.object.supports.memory == "linear"
    return own and rows and subject.object.attend is Attention.attend


@check("layer", when=blocked)
def in_blocks(subject: Subject) -> Iterator[Measure]:
    """A few queries at a time give what all give at once, with padding too; so do their gradients."""
    for case, options in subject.forms():
        layer = subject.layer(**options)
        valid = padded(9)
        for way, mask in {"": None, " padding": valid, " pairs": valid[:, None, None, :]}.items():
            x = subject.inputs(layer)[0].requires_grad_()
            found = []
            for pairs in (2**20, 4 * layer.heads * 9):
                with pairs_at_once(pairs):
                    y = layer(x, mask=mask)
                    found.append((y, *torch.autograd.grad(y.square().sum(), x)))
            for what, few, all_of_them in zip(("", " gradient"), *reversed(found), strict=True):
                yield same(f"{case}{way}{what}", few, all_of_them)


@check("layer", poisoned=False)
def memory_law(subject: Subject) -> Iterator[Measure]:
    """Twice the length makes the largest tensor twice as large where memory is linear, 4 × at most."""
    law = subject.object.supports.memory
    yield holds("declared", law in ("linear", "quadratic"), f"supports.memory is {law!r}")
    length = 512 if law == "linear" else 192
    for case, options in subject.forms():
        layer = subject.layer(dtype=torch.float32, **options)
        sizes = []
        for tokens in (length, 2 * length):
            with torch.no_grad(), pairs_at_once(2**14), LargestTensor() as seen:
                layer(torch.zeros(1, tokens, layer.dim))
            sizes.append(seen.elements)
        yield Measure(f"{case} {law}", sizes[1] / sizes[0], 2.1 if law == "linear" else 4.1)
