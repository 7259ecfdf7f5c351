"""The kernels of statistics of rows, by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from interpreted import MARKS, answer, verdicts
from torch import Tensor

from attlas import masks, ops

pytestmark = MARKS

#: What a case is when it says nothing else; `mask` names one of `mask_of`.
PLAIN: dict[str, Any] = {
    "batch": 1, "heads": 2, "kv_heads": 1, "queries": 70, "keys": 70, "dim": 16, "mask": "causal",
    "dtype": "float32", "ids": True, "sinks": False, "valid": False, "first": 1, "size": 1.0,
    "offset": None, "view": False,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "float16 in tiles of 128": {"dtype": "float16", "queries": 150, "keys": 150},
    "behind a past": {"queries": 5, "keys": 100},
    "before the keys": {"queries": 40, "keys": 40, "offset": -9},
    "keys to come": {"queries": 33, "keys": 90, "offset": 20},
    "one query": {"queries": 1, "keys": 67},
    "both sides": {"mask": "all"},
    "padded": {"mask": "padded", "batch": 2, "valid": True, "first": 3},
    "booleans": {"mask": "dense"},
    "booleans for all heads": {"mask": "shared", "batch": 2},
    "sink logits": {"sinks": True},
    "no ids": {"ids": False},
    "an odd width": {"dim": 24},
    "large scores": {"size": 30.0},
    "tokens before heads": {"view": True},
}  # fmt: skip
#: On a GPU alone.
LARGE: dict[str, dict[str, Any]] = {
    f"{dim} wide in {dtype}, {mask}": {
        "queries": 700, "keys": 900, "dim": dim, "dtype": dtype, "mask": mask, "heads": 4,
        "batch": 2, "valid": mask == "padded",
    }
    for dim in (16, 64, 80, 128, 256)
    for dtype in ("bfloat16", "float16", "float32")
    for mask in ("causal", "padded", "dense")
}  # fmt: skip
WHAT = (
    "lse", "entropy", "peak", "first", "itself", "previous", "distance", "duplicate", "induction",
    "copying", "received",
)  # fmt: skip


def mask_of(case: dict[str, Any], device: str) -> Any:
    """The mask that a case names."""
    size = case["batch"], case["heads"], case["queries"], case["keys"]
    dense = torch.rand(size) > 0.4
    dense[0, 0, 3 % size[2]] = False
    valid = torch.ones(size[0], size[3], dtype=torch.bool)
    valid[-1, :5] = False
    return {
        "all": lambda: None, "causal": lambda: masks.causal,
        "padded": lambda: masks.causal & masks.padding(valid.to(device)),
        "dense": lambda: dense.to(device), "shared": lambda: dense[:, :1].to(device),
    }[case["mask"]]()  # fmt: skip


def given(case: dict[str, Any], device: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """q, k and the other arguments of the op."""
    torch.manual_seed(0)
    batch, dtype = case["batch"], getattr(torch, case["dtype"])
    sizes = (case["queries"], case["heads"]), (case["keys"], case["kv_heads"])
    q, k = (torch.randn(batch, *size, case["dim"]) for size in sizes)
    q, k = (x.transpose(1, 2) if case["view"] else x.transpose(1, 2).contiguous() for x in (q, k))
    more: dict[str, Any] = {"mask": mask_of(case, device), "first": case["first"]}
    if case["ids"]:
        more["ids"] = torch.randint(-1, 6, (batch, case["keys"] + 1)).to(device)
    if case["sinks"]:
        more["sinks"] = torch.randn(case["heads"]).to(device)
    if case["valid"]:
        more["valid"] = (torch.rand(batch, case["queries"]) > 0.2).to(device)
    return (q * case["size"]).to(device, dtype), k.to(device, dtype), more | {"q_offset": case["offset"]}


def through_kernels(q: Tensor, k: Tensor, more: dict[str, Any]) -> Any:
    """The op's kernel route, which on a CPU the op itself refuses."""
    if q.is_cuda:
        return ops.row_statistics(q, k, **more, peak_at=True, received=True, route="kernel")
    module = sys.modules["attlas.ops.row_statistics"]
    offset = k.shape[2] - q.shape[2] if more["q_offset"] is None else more["q_offset"]
    return module.kernel(
        q, k, more.get("ids"), torch.tensor(more["first"]).expand(len(q)), more["mask"],
        more.get("sinks"), more.get("valid"), q.shape[-1] ** -0.5, offset, True, True,
    )  # fmt: skip


def errors(name: str, device: str = "cpu") -> list[tuple[str, float, float]]:
    """Of each statistic against float64, and what is allowed: twice the error of plain operations."""
    case = {**PLAIN, **{**CASES, **LARGE}[name]}
    q, k, more = given(case, device)
    ours = through_kernels(q, k, more)
    asked = {"peak_at": True, "received": True, "route": "reference"}
    plain = ops.row_statistics(q, k, **more, **asked)
    true = ops.row_statistics(q.double(), k.double(), **more, **asked)
    found = []
    # A weight is as far off as its score is rounded, by an amount that grows with the score.
    scores = ops.grouped_product(q.double(), k.double().mT) * q.shape[-1] ** -0.5
    largest = scores.abs().max().item()
    for what in WHAT:
        a, b, x = (getattr(s, what) for s in (ours, plain, true))
        if x is None:
            assert a is None
            continue
        dead = x == -torch.inf
        assert torch.equal(a == -torch.inf, dead), what
        a, b, x = (y.double().masked_fill(dead, 0.0) for y in (a, b, x))
        unit = 4 * torch.finfo(torch.float32).eps * max(1.0, largest, x.abs().max().item())
        found.append((what, (a - x).abs().max().item(), 2 * (b - x).abs().max().item() + unit))
    same = (ours.peak_at == plain.peak_at).double().mean().item()  # but for ties
    return [*found, ("peak_at", 1 - same, 0.001)]


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, errors) as told:
        yield told


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_statistics_kernels_are_as_exact_as_plain_operations(name: str, judged: Any) -> None:
    assert not [each for each in judged(name) if not each[1] <= each[2]]


@pytest.mark.parametrize(
    ("name", "dtype", "dim"),
    [("_rows", "bf16", 128), ("_rows", "fp32", 64), ("_rows", "bf16", 256), ("_columns", "bf16", 128)],
)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_statistics_kernels_compile_for_a_gpu_that_is_not_there(
    name: str, dtype: str, dim: int
) -> None:
    """The interpreter takes what the compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from attlas.kernels import row_statistics, row_statistics_run

    kernel = getattr(row_statistics, name)
    q = torch.empty(1, 1, 1, dim, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    fixed = row_statistics_run.Call(q, q, None, True, 1.0, 0).fixed | {"IDS": True, "PEAK": True}
    options = {"num_warps": fixed.pop("num_warps"), "num_stages": fixed.pop("num_stages")}
    narrow = dict.fromkeys(("q", "k"), f"*{dtype}") | {"mask": "*i1"}
    numbers = dict.fromkeys(("found", "tops", "shares", "received"), "*fp32")
    whole = ("own_ids", "coming_ids", "tokens", "before", "untils", "peaks")
    pointers = narrow | numbers | dict.fromkeys(whole, "*i32") | {"factor": "fp32", "low": "fp32"}
    names = kernel.arg_names
    taken = {n: pointers.get(n, "constexpr" if n in fixed else "i32") for n in names}
    source = ASTSource(kernel, taken, {(names.index(n),): fixed[n] for n in names if n in fixed})
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]


if __name__ == "__main__":
    answer(errors, CASES)
