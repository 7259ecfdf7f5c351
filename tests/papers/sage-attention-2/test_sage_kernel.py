"""The kernel over integers, run by Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted import MARKS, answer, verdicts

from attlas import masks, ops
from attlas.ops import sage_attention as op

pytestmark = MARKS

#: What a case is when it says nothing else.
PLAIN: dict[str, Any] = {
    "batch": 1, "heads": 2, "kv": 1, "queries": 70, "keys": 150, "dim": 64, "dtype": "float16",
    "mask": None, "values": "fp8", "bits": 8, "options": {},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "all pairs": {},
    "causal": {"mask": masks.causal},
    "causal, blocks whole": {"mask": masks.causal, "queries": 128, "keys": 128},
    "causal, more queries than keys": {"mask": masks.causal, "queries": 150, "keys": 70},
    "causal, several blocks": {"mask": masks.causal, "queries": 260, "keys": 390},
    "one query": {"mask": masks.causal, "queries": 1},
    "one key": {"keys": 1},
    "batch and groups": {"batch": 2, "heads": 6, "kv": 2, "mask": masks.causal},
    "heads of 128": {"dim": 128, "mask": masks.causal},
    "values of 16 bits": {"values": "fp16", "mask": masks.causal},
    "heads of 128, values of 16 bits": {"values": "fp16", "dim": 128},
    "4 bits": {"bits": 4, "options": {"smooth_q": False}},
    "scales of blocks": {"options": {"per": "block"}, "mask": masks.causal},
    "nothing smoothed": {"options": {"smooth_k": False, "smooth_v": False}},
    "bfloat16": {"dtype": "bfloat16", "mask": masks.causal},
}


def errors(name: str, device: str = "cpu") -> list[tuple[float, float]]:
    """Of the kernel's outputs and sums against float64, and what is allowed: twice the plain form's."""
    case = {**PLAIN, **CASES[name]}
    torch.manual_seed(0)
    sizes = [(case["heads"], case["queries"]), (case["kv"], case["keys"]), (case["kv"], case["keys"])]
    q, k, v = (torch.randn(case["batch"], n, tokens, case["dim"]) for n, tokens in sizes)
    k, v = k + 3 * torch.randn(1, case["kv"], 1, case["dim"]), v + 1
    given = [t.to(device, getattr(torch, case["dtype"])) for t in (q, k, v)]
    options = {"bits": case["bits"], "values": case["values"], "k_block": 128, **case["options"]}
    taken = patch.object(op, "refuses", lambda *_: None) if device == "cpu" else nullcontext()
    with taken, patch.object(torch.cuda, "device_of", lambda _: nullcontext()):
        found = op.sage_attention(*given, mask=case["mask"], route="kernel", **options)
    plain = op.sage_attention(*given, mask=case["mask"], route="reference", **options)
    exact = ops.attend(
        *(t.double() for t in given), mask=case["mask"], return_lse=True, route="reference"
    )
    return [_error(*three) for three in zip(found, plain, exact, strict=True)]


def _error(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    assert found.dtype == plain.dtype
    assert found.isneginf().equal(exact.isneginf())
    found, plain, exact = (t.double().nan_to_num(neginf=0.0) for t in (found, plain, exact))
    unit = torch.finfo(torch.bfloat16).eps / 8 * float(exact.abs().max())
    return float((found - exact).abs().max()), 2 * float((plain - exact).abs().max()) + unit


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, errors) as told:
        yield told


@pytest.mark.parametrize("name", CASES)
def test_sage_kernel_is_as_exact_as_the_plain_form(name: str, judged: Any) -> None:
    for error, allowed in judged(name):
        assert error <= allowed


@pytest.mark.parametrize("values", ["fp8e4nv", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_sage_kernel_compiles_for_a_gpu_that_is_not_there(values: str, dim: int) -> None:
    """The interpreter takes what the compiler refuses."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from attlas.kernels.sage import Tiles, _forward

    cut = Tiles()
    fixed = {
        "DIM": dim, "QUERIES": cut.queries, "KEYS": cut.keys, "CAUSAL": True, "SMOOTH": True,
        "CAREFUL": False,
    }  # fmt: skip
    types = {"q": "*i8", "k": "*i8", "v": f"*{values}", "out": "*fp16", "lift": "fp32"}
    types |= dict.fromkeys(("row_scales", "column_scales", "v_scale", "v_mean", "lse"), "*fp32")
    names = _forward.arg_names
    taken = {n: types.get(n, "constexpr" if n in fixed else "i32") for n in names}
    made = compile(
        ASTSource(_forward, taken, {(names.index(n),): fixed[n] for n in fixed}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": cut.warps, "num_stages": cut.stages},
    )
    assert made.metadata.shared <= 227 * 1024
    assert "wgmma" in made.asm["ptx"]
    assert ".s8.s8" in made.asm["ptx"]
    assert (".e4m3.e4m3" in made.asm["ptx"]) == (values != "fp16")


if __name__ == "__main__":
    answer(errors, [n for n, case in CASES.items() if case.get("dtype") != "bfloat16"])
