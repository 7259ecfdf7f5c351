"""Gradients of biases of distances, by Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted import MARKS, answer, verdicts
from torch import Tensor

from attlas import masks, ops
from attlas.ops import reference, toeplitz, toeplitz_kernels
from attlas.positions.base import from_table

pytestmark = MARKS

#: What a case is when it says nothing else; `offset` of None stands for the last query at the last key.
PLAIN: dict[str, Any] = {
    "batch": 1, "heads": 2, "kv_heads": 2, "queries": 50, "keys": 50, "dim": 16, "width": 16,
    "mask": "all", "offset": None, "dtype": "float32", "lse": False, "tile": (32, 16), "held": None,
}  # fmt: skip
MASKS: dict[str, Callable[[int], masks.Mask | None]] = {
    "all": lambda keys: None,
    "causal": lambda keys: masks.causal,
    "window": lambda keys: masks.causal & (masks.window(20) | masks.sinks(3)),
    "padding": lambda keys: (
        masks.causal & masks.padding(torch.arange(keys) < torch.tensor([[keys], [9]]))
    ),
    "heads": lambda keys: masks.per_head(masks.causal, masks.window(9), masks.full, masks.strided(7)),
    "documents": lambda keys: masks.causal & masks.document(torch.arange(keys) // 30),
    "far": lambda keys: ~masks.window(30),
}
CASES: dict[str, dict[str, Any]] = {
    "two-sided": {"lse": True},
    "causal": {"mask": "causal"},
    "whole tiles": {"queries": 48, "keys": 48, "mask": "causal", "tile": (16, 16)},
    "grouped heads, a batch and a cache": {
        "batch": 3, "heads": 4, "queries": 20, "keys": 50, "mask": "causal", "lse": True,
    },
    "widths between powers of two": {"dim": 20, "width": 24, "queries": 40, "keys": 40},
    "a window": {"mask": "window", "tile": (16, 16)},
    "padding": {"batch": 2, "mask": "padding", "queries": 40, "keys": 40, "tile": (16, 16)},
    "a pattern a head": {"heads": 4, "mask": "heads", "queries": 40, "keys": 40, "tile": (16, 16)},
    "documents": {"mask": "documents", "tile": (32, 32)},
    "rows that see nothing": {"mask": "far", "lse": True},
    "queries at the first keys": {"mask": "causal", "queries": 30, "keys": 50, "offset": 0},
    "queries before the keys": {"queries": 30, "keys": 50, "offset": -20},
    "one query": {"queries": 1},
    "heads one after the other": {"mask": "causal", "heads": 3, "kv_heads": 1, "queries": 30, "held": 1},
    "float16": {"dtype": "float16", "batch": 2},
}  # fmt: skip
#: On a GPU alone, in tiles of their own.
LARGE: dict[str, dict[str, Any]] = {
    f"{mask}, {length} of {dim} in {dtype}": {
        "batch": 2, "heads": 4, "queries": length, "keys": length, "dim": dim, "width": dim,
        "mask": mask, "dtype": dtype, "lse": mask == "all",
    }
    for mask in ("all", "causal", "window", "padding", "heads", "documents")
    for length, dim, dtype in (
        (1536, 64, "bfloat16"), (1100, 128, "bfloat16"), (1088, 80, "float16"), (1030, 64, "float32"),
    )
}  # fmt: skip


def results(run: Any, given: list[Tensor], grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Gradients of q, k, v and the table, of one way to compute."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in given[:3]]
    leaves.append(given[3].to(torch.promote_types(dtype, torch.float32)).requires_grad_())
    out, lse = run(*leaves)
    loss = (out.double() * grads[0].double()).sum()
    if len(grads) > 1:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0).double() * grads[1]).sum()
    return [x.double() for x in torch.autograd.grad(loss, leaves)]


def errors(name: str, device: str = "cpu") -> list[tuple[float, float]]:
    """Of each gradient against float64, and what is allowed: twice that of the plain route, and a bit."""
    from attlas.kernels import toeplitz_run

    case = {**PLAIN, **{**CASES, **LARGE}[name]}
    torch.manual_seed(0)
    batch, heads, queries, keys = (case[n] for n in ("batch", "heads", "queries", "keys"))
    offset = keys - queries if case["offset"] is None else case["offset"]
    dtype, mask = getattr(torch, case["dtype"]), MASKS[case["mask"]](keys)
    reach = max(offset + queries, keys - offset)
    shapes = [(batch, queries, heads, case["dim"]), (batch, keys, case["kv_heads"], case["dim"]),
              (batch, keys, case["kv_heads"], case["width"])]  # fmt: skip
    given = [torch.randn(shape, device=device).to(dtype).transpose(1, 2) for shape in shapes]
    given.append(torch.randn(heads, 2 * reach - 1, device=device))
    grads = [torch.randn(batch, heads, queries, case["width"], device=device).to(dtype)]
    if case["lse"]:
        grads.append(torch.randn(batch, heads, queries, device=device))
    options: dict[str, Any] = {"mask": mask, "scale": 0.3, "q_offset": offset}

    def kernel(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return toeplitz.flex_biased(q, k, v, table, **options)

    def plain(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return reference(q, k, v, score_mod=from_table(table), **options)

    def chunks(q: Tensor, k: Tensor, v: Tensor, table: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return ops.memory_efficient(q, k, v, score_mod=from_table(table), **options)

    # FlexAttention, which compiles for half a minute, stands in `test_routes_on_cuda`.
    changes: list[tuple[Any, str, Any]] = [
        (toeplitz, "flex", chunks), (toeplitz_run, "HELD", case["held"] or toeplitz_run.HELD),
    ]  # fmt: skip
    if device == "cpu":
        tile = toeplitz_run.Tile(*case["tile"], 4, 1)
        changes += [
            (toeplitz_kernels, "refuses", lambda *_: None), (toeplitz_run, "tile_of", lambda *_: tile),
            (toeplitz_run, "walked", lambda *_: 2), (toeplitz_run, "units", lambda _: 1),
            (toeplitz_run, "PROGRAMS", 8),
        ]  # fmt: skip
    with ExitStack() as stack:
        for of, what, other in changes:
            stack.enter_context(patch.object(of, what, other))
        ours = results(kernel, given, grads, dtype)
    true = results(plain, given, grads, torch.float64)
    near = results(plain, given, grads, dtype)
    return [
        ((a - x).abs().max().item(), 2 * (b - x).abs().max().item() + 2e-6 * x.abs().max().item())
        for a, b, x in zip(ours, near, true, strict=True)
    ]


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, errors) as told:
        yield told


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_gradients_are_as_exact_as_plain_operations(name: str, judged: Any) -> None:
    found = dict(zip(("q", "k", "v", "table"), judged(name), strict=True))
    assert not {what: pair for what, pair in found.items() if not pair[0] <= pair[1]}


if __name__ == "__main__":
    answer(errors, CASES)
