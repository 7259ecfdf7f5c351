"""The kernels for rows of packed queries, by Triton's interpreter without a GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted import MARKS, answer, verdicts
from torch import Tensor

from attlas.ops import block_packed, packed_rows

pytestmark = MARKS

#: Whether queries have a part of their own, queries, width, blocks that each lists, type.
CASES: dict[str, tuple[bool, int, int, int, str]] = {
    "own and three": (True, 70, 32, 3, "float32"),
    "rows alone": (False, 40, 32, 2, "float32"),
    "a width that is no power of two": (True, 33, 24, 2, "float32"),
    "float16": (True, 50, 16, 3, "float16"),
    "bfloat16": (True, 300, 128, 3, "bfloat16"),
}


def plan(queries: int, count: int, device: str) -> block_packed.Plan:
    """Of lists of some blocks of 5, in which some stand for none."""
    listed = torch.rand(2, 3, queries, 5).argsort(-1)[..., :count]
    listed[:, :, ::4, -1] = -1
    listed[:, :, 7] = -1
    return block_packed.Plan.of(listed.to(device), 5)


def worked(q: Tensor, own: Tensor, sums: Tensor, beside: bool, it: block_packed.Plan) -> list[Tensor]:
    """Rows, outputs and sums, and the gradients of all that they are made of."""
    given = [t.detach().requires_grad_() for t in (q, own, sums)]
    rows = packed_rows.taken(given[0], it.tokens, it.rows)
    wide = rows.double() if rows.dtype == torch.float64 else rows.float()
    lse = wide.sin().sum(-1)
    part = None
    if beside:  # a slice of what is longer, as the call of own blocks gives it
        unlisted = torch.arange(q.shape[2], device=q.device) % 3 == 0
        part = given[1][:, :, 2:], given[2][:, :, 2:].masked_fill(unlisted, -torch.inf)
    out, whole = packed_rows.joined(part, rows, lse, it.rows)
    seen = whole.masked_fill(whole == -torch.inf, 0.0)
    up = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=q.device).view(out.shape)
    loss = (out * up.to(out.dtype)).sum(dtype=whole.dtype) + seen.sin().sum()
    return [out, whole, *torch.autograd.grad(loss, given if beside else given[:1])]


def errors(name: str, device: str = "cpu") -> list[tuple[float, float]]:
    """Of each result against float64, and what is allowed: twice that of gathering, and a bit."""
    beside, queries, width, count, kind = CASES[name]
    torch.manual_seed(0)
    it, dtype = plan(queries, count, device), getattr(torch, kind)
    q, own = (torch.randn(2, 3, queries + n, width).to(device, dtype) for n in (0, 2))
    sums = torch.randn(2, 3, queries + 2).to(device)
    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(patch.object(packed_rows, "by_kernels", lambda x: True))
            stack.enter_context(patch("torch.cuda.device_of", lambda x: nullcontext()))
        ours = worked(q, own, sums, beside, it)
    with patch.object(packed_rows, "by_kernels", lambda x: False):
        plain = worked(q, own, sums, beside, it)
        exact = worked(q.double(), own.double(), sums.double(), beside, it)
    return [_error(*three) for three in zip(ours, plain, exact, strict=True)]


def _error(ours: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    assert ours.dtype == plain.dtype
    assert ours.isneginf().equal(exact.isneginf())
    ours, plain, exact = (t.detach().double().nan_to_num(neginf=0.0) for t in (ours, plain, exact))
    # The gradient of a sum of exponentials is a difference of dot products, summed in another order.
    unit = 8 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    return float((ours - exact).abs().max()), 2 * float((plain - exact).abs().max()) + unit


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, errors) as told:
        yield told


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_are_as_exact_as_gathered_ones(name: str, judged: Any) -> None:
    for error, allowed in judged(name):
        assert error <= allowed


@pytest.mark.parametrize("kernel", ["_take", "_sum", "_join", "_join_back"])
def test_packed_rows_compile_for_a_gpu_that_is_not_there(kernel: str) -> None:
    """The interpreter takes what the compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from attlas.kernels import packed_rows as kernels

    function = getattr(kernels, kernel)
    names = function.arg_names
    types = dict.fromkeys(("own", "x", "found", "out", "above", "d_own", "d_x"), "*bf16")
    types |= dict.fromkeys(("own_lse", "x_lse", "lse", "of_sums", "d_own_lse", "d_x_lse"), "*fp32")
    fixed = {n: at for n, at in {"D": 96, "ROOM": 128, "EACH": 32, "OWN": True}.items() if n in names}
    taken = {n: types.get(n, "constexpr" if n in fixed else "i32") for n in names}
    source = ASTSource(function, {**taken, "at": "*i64"}, {(names.index(n),): fixed[n] for n in fixed})
    assert "ld.global" in compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


if __name__ == "__main__":
    answer(errors, [name for name, case in CASES.items() if case[-1] != "bfloat16"])
