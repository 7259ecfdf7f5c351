"""The kernels for lookahead keys, run by Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted import MARKS, answer, verdicts
from torch import Tensor

import attlas
from attlas import ops
from attlas.catalog.registry import find

pytestmark = MARKS

Castle: Any = find("castle-lookahead-keys").object

#: What a case is when it says nothing else: `seen` tokens stand in a cache before the `tokens`.
PLAIN: dict[str, Any] = {
    "batch": 1, "heads": 1, "kv_heads": 1, "width": 16, "tokens": 70, "seen": 0, "window": None,
    "padding": None, "dtype": "float32",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "several waves": {"tokens": 75},
    "one short block": {"tokens": 16},
    "shared keys, a width between powers of two": {"heads": 2, "width": 12, "tokens": 40},
    "a window": {"window": 9, "tokens": 80},
    "a window of one": {"window": 1, "tokens": 33},
    "padding before and behind": {"batch": 2, "padding": "both", "tokens": 50},
    "behind a cache": {"seen": 21, "tokens": 50},
    "behind a cache, a window, padding, shared keys": {
        "batch": 2, "heads": 2, "seen": 21, "tokens": 37, "window": 25, "padding": "both",
    },
    "float16": {"dtype": "float16", "tokens": 50},
}  # fmt: skip
#: On a GPU alone.
LARGE: dict[str, dict[str, Any]] = {
    f"{tokens} of {width} in {dtype}, {name}": {
        "tokens": tokens, "width": width, "dtype": dtype, "heads": 4, "kv_heads": 2, **case,
    }
    for dtype in ("bfloat16", "float32")
    for tokens, width in ((1111, 64), (513, 128 if dtype != "float32" else 40))
    for name, case in {"plain": {}, "window": {"window": 200}, "cache": {"seen": 300, "batch": 2}}.items()
}  # fmt: skip


def made(case: dict[str, Any], device: str) -> tuple[Any, Tensor, Tensor | None, list[Tensor]]:
    """(layer, inputs, which are valid, gradients of the outputs and of what keys have learned)."""
    torch.manual_seed(0)
    dtype, width = getattr(torch, case["dtype"]), case["width"]
    layer = attlas.make(
        "castle", dim=width, heads=case["heads"], kv_heads=case["kv_heads"], head_dim=width, causal=True,
        window=case["window"],
    ).to(device, dtype)  # fmt: skip
    count = case["seen"] + case["tokens"]
    x = (2 * torch.randn(case["batch"], count, width)).to(device, dtype)
    valid = None
    if case["padding"]:
        valid = torch.ones(case["batch"], count, dtype=torch.bool, device=device)
        valid[0, :5] = False
        valid[-1, -3:] = False
    above = [torch.randn(case["batch"], case["tokens"], width),
             torch.randn(case["batch"], case["kv_heads"], 1, count, width)]  # fmt: skip
    return layer, x, valid, [g.to(device) for g in above]


def results(
    layer: Any, x: Tensor, valid: Tensor | None, above: list[Tensor], seen: int
) -> dict[str, Tensor]:
    """Outputs, what keys have learned, and all gradients."""
    x, cache = x.clone().requires_grad_(), layer.init_cache()
    layer.zero_grad()
    if seen:
        layer(x[:, :seen], cache=cache, mask=None if valid is None else valid[:, :seen])
    out = layer(x[:, seen:], cache=cache, mask=valid)
    u = cache.layers[0].states["lookahead"]
    torch.autograd.backward((out, u), [g.to(x.dtype) for g in above])
    grads = {"dx": x.grad} | {n: p.grad for n, p in layer.named_parameters()}
    found = {"out": out.detach(), "u": u.detach(), **grads}
    return {n: t.double() for n, t in found.items() if t is not None}


def by_kernels(device: str) -> ExitStack:
    """Kernels take every call; without a GPU in small tiles and waves, of which U is kept once."""
    stack = ExitStack()
    if device == "cpu":
        from attlas.kernels import lookahead_run as run

        some, others = run.Tiles(16, 32, 4, 1), run.Tiles(32, 16, 4, 1)
        stack.enter_context(patch.dict(run.FORWARD, dict.fromkeys(run.FORWARD, some)))
        stack.enter_context(patch.dict(run.BACKWARD, dict.fromkeys(run.BACKWARD, others)))
        stack.enter_context(patch.multiple(run, WAVE=32, PAIRS=1, BLOCK=32, ANCHORS=1))
        stack.enter_context(patch.object(ops, "lookahead_refuses", lambda given: None))
        stack.enter_context(patch("torch.cuda.device_of", lambda x: nullcontext()))
    return stack


def by_blocks() -> Any:
    return patch.object(ops, "lookahead_refuses", lambda given: "blocks are asked for")


def errors(name: str, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Of every result against float64, and what is allowed: twice that of the blocks, and a bit."""
    case = {**PLAIN, **{**CASES, **LARGE}[name]}
    layer, *given = made(case, device)
    with (
        by_kernels(device),
        patch("attlas.kernels.lookahead_run.Lookahead.apply", wraps=applied()) as ran,
    ):
        ours = results(layer, *given, case["seen"])
    assert ran.call_count == (2 if case["seen"] else 1)
    with by_blocks():
        plain = results(layer, *given, case["seen"])
        layer, given[0] = layer.double(), given[0].double()
        true = results(layer, *given, case["seen"])
    unit = torch.finfo(getattr(torch, case["dtype"])).eps
    found = {}
    for part, exact in true.items():
        off, theirs = ((x[part] - exact).abs().max().item() for x in (ours, plain))
        found[part] = (off, 2 * theirs + 2 * unit * exact.abs().max().item())
    return found


def applied() -> Callable[..., Any]:
    from attlas.kernels.lookahead_run import Lookahead

    return Lookahead.apply


def twice(name: str, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Of the gradient of a gradient, which goes by the blocks."""
    layer, x, _, _ = made({**PLAIN, "tokens": 20}, device)
    found = []
    for dtype, way in ((torch.float32, by_kernels(device)), (torch.float64, by_blocks())):
        layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()
        with way:
            (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), x)[0].double())
    return {name: ((found[0] - found[1]).abs().max().item(), 1e-4 * found[1].abs().max().item())}


def judge(name: str, device: str = "cpu") -> dict[str, tuple[float, float]]:
    return twice(name, device) if name == "twice" else errors(name, device)


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, judge) as told:
        yield told


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_kernels_are_as_exact_as_the_blocks(name: str, judged: Any) -> None:
    found = judged(name)
    assert {"out", "u", "dx", "ahead_proj.weight", "q_proj.weight"} <= set(found)
    assert not {part: pair for part, pair in found.items() if not pair[0] <= pair[1]}


def test_gradients_can_be_differentiated(judged: Any) -> None:
    assert all(off <= allowed for off, allowed in judged("twice").values())


class _Sharper(Castle):
    def normalize(self, scores: Tensor, inputs: Any) -> Tensor:
        return super().normalize(2 * scores, inputs)


@pytest.mark.parametrize(
    ("kind", "options", "call"),
    [
        (Castle, {}, {"mask": torch.ones(1, 1, 20, 20, dtype=torch.bool)}),
        (Castle, {"dropout": 0.5}, {}),
        (Castle, {"position": "alibi"}, {}),
        (Castle, {"causal": False}, {}),
        (Castle, {"mask": attlas.masks.window(4)}, {}),
        (_Sharper, {}, {}),
    ],
)
def test_calls_that_mean_more_never_reach_the_kernels(kind: Any, options: Any, call: Any) -> None:
    layer = kind(dim=32, heads=2, **{"causal": True, **options})
    taken = patch.object(ops, "lookahead_refuses", lambda given: None)
    with taken, patch.object(ops, "lookahead_attend", side_effect=AssertionError):
        layer(torch.randn(1, 20, 32), **call)
        with pytest.raises(AssertionError):
            Castle(dim=32, heads=2, causal=True)(torch.randn(1, 20, 32))


def test_kernels_are_not_for_the_host() -> None:
    layer = Castle(dim=32, heads=2, causal=True)
    q, k, v, inputs = layer.prepare(torch.randn(1, 20, 32))
    assert ops.lookahead_refuses(layer.met(q, k, v, inputs)) == "not on a CUDA device"


if __name__ == "__main__":
    answer(judge, [*CASES, "twice"])
