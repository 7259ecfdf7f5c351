"""The kernels of attention in short windows, by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from interpreted import MARKS, answer, verdicts
from torch import Tensor

from attlas.catalog import registry

pytestmark = MARKS

#: What a case is when it says nothing else: `mask` windows of an image have their own.
PLAIN: dict[str, Any] = {
    "rows": 4, "heads": 2, "tokens": 16, "dim": 16, "width": 16, "bias": True, "mask": 2,
    "dtype": "float32", "view": False, "size": 1.0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "bias and mask": {},
    "windows of 7 × 7": {"tokens": 49, "rows": 2},
    "windows of 8 × 8 in float16": {"tokens": 64, "rows": 2, "dtype": "float16"},
    "float16": {"tokens": 49, "rows": 2, "dtype": "float16"},
    "no bias": {"bias": False},
    "no mask": {"mask": 0},
    "neither": {"bias": False, "mask": 0, "tokens": 5},
    "one token": {"tokens": 1},
    "tiles of channels": {"dim": 72, "width": 40},
    "queries wider than values": {"dim": 48, "width": 8},
    "more windows than programs": {"rows": 24, "heads": 1, "mask": 3},
    "channels of a joined projection": {"view": True, "tokens": 9},
    "a row that sees nothing": {"mask": -2},
    "large scores": {"size": 8.0},
}  # fmt: skip
#: The second derivatives, which come from the definition.
TWICE = "gradients of gradients"
#: On a GPU alone.
LARGE: dict[str, dict[str, Any]] = {
    f"{side} × {side} of {dim} in {dtype}": {
        "tokens": side * side, "dim": dim, "width": dim, "rows": 96, "heads": 3, "mask": 4,
        "dtype": dtype,
    }
    for side, dim in ((7, 32), (8, 32), (8, 64), (11, 48), (7, 128))
    for dtype in ("bfloat16", "float16", "float32")
}  # fmt: skip


def given(case: dict[str, Any], device: str) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """(q, k, v and the bias, the mask, the gradient of the output)."""
    torch.manual_seed(0)
    rows, heads, tokens = (case[name] for name in ("rows", "heads", "tokens"))
    dtype = getattr(torch, case["dtype"])
    if case["view"]:
        qkv = torch.randn(rows, tokens, 3, heads, case["dim"]).permute(2, 0, 3, 1, 4)
        leaves = list(qkv * case["size"])
    else:
        sizes = (case["dim"], case["dim"], case["width"])
        leaves = [torch.randn(rows, heads, tokens, n) * case["size"] for n in sizes]
    leaves += [torch.randn(heads, tokens, tokens)] if case["bias"] else []
    grad = torch.randn(rows, heads, tokens, leaves[2].shape[-1])
    mask = torch.rand(abs(case["mask"]), tokens, tokens) > 0.4
    mask |= torch.eye(tokens, dtype=torch.bool)
    if case["mask"] < 0:
        mask[0, 3] = False
    leaves = [x.to(device, dtype) for x in leaves]
    return leaves, mask.to(device) if case["mask"] else None, grad.to(device, dtype)


def results(run: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of one way to compute."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    q, k, v, *more = leaves
    out = run(q, k, v, more[0] if more else None)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, grad.to(out.dtype)))]


def twice(run: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The gradients of the length of the gradients."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = run(*leaves)
    first = torch.autograd.grad(out, leaves, grad.to(out.dtype), create_graph=True)
    lengths = sum((x.square().sum() for x in first), out.new_zeros(()))
    return [x.double() for x in torch.autograd.grad(lengths, leaves)]


def errors(name: str, device: str = "cpu") -> list[tuple[float, float]]:
    """Of each result against float64, and what is allowed: twice that of plain operations, and a bit."""
    from attlas.kernels import windows_run

    case = {**PLAIN, **{**CASES, **LARGE, TWICE: {"tokens": 5, "rows": 2}}[name]}
    leaves, seen, grad = given(case, device)
    op: Any = registry.find("flash-window-attention").object
    definition = inspect.unwrap(op).__globals__["plain"]
    added = None
    if seen is not None:
        added = torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)
        added = added.to(leaves[0].dtype)
    if device == "cpu":
        windows_run.units = lambda _: 1

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        found: Tensor = windows_run.Windows.apply(  # type: ignore[no-untyped-call]
            q, k, v, bias, added, 0.3, definition
        )
        return found

    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        found: Tensor = definition(q, k, v, bias, added, 0.3)
        return found

    of = twice if name == TWICE else results
    ours, near = of(kernel, leaves, grad), of(plain, leaves, grad)
    true = of(plain, [x.double() for x in leaves], grad)
    unit = torch.finfo(grad.dtype).eps
    return [
        ((a - x).abs().max().item(), 2 * (b - x).abs().max().item() + 2 * unit * x.abs().max().item())
        for a, b, x in zip(ours, near, true, strict=True)
    ]


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, errors) as told:
        yield told


@pytest.mark.parametrize("name", [*CASES, TWICE, *LARGE])
def test_window_kernels_are_as_exact_as_plain_operations(name: str, judged: Any) -> None:
    found = dict(zip(("out", "dq", "dk", "dv", "dbias"), judged(name), strict=False))
    assert not {what: pair for what, pair in found.items() if not pair[0] <= pair[1]}


@pytest.mark.parametrize(
    ("name", "dtype"), [("_forward", "bf16"), ("_forward", "fp32"), ("_backward", "bf16")]
)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_window_kernels_compile_for_a_gpu_that_is_not_there(name: str, dtype: str) -> None:
    """The interpreter takes what the compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from attlas.kernels import windows

    kernel = getattr(windows, name)
    fixed: dict[str, Any] = {
        "dk": 32, "dv": 32, "N": 64, "D": 32, "BIAS": True, "MASK": True, "SUMS": True,
        "PRECISION": "ieee",
    }  # fmt: skip
    pointers = dict.fromkeys(
        ("q", "k", "v", "bias", "mask", "out", "d_out", "d_q", "d_k", "d_v"), f"*{dtype}"
    )
    pointers |= {"d_bias": "*fp32", "scale": "fp32"}
    names = kernel.arg_names
    taken = {n: pointers.get(n, "constexpr" if n in fixed else "i32") for n in names}
    source = ASTSource(kernel, taken, {(names.index(n),): fixed[n] for n in names if n in fixed})
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


if __name__ == "__main__":
    answer(errors, [*CASES, TWICE])
